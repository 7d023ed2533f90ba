"""Every program that the wrappers of `kernels/cuda/` can ask for, by file and definitions."""

from itertools import product

from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.cuda.convolutions import block_for


def batch_norm(threads, with_single):
    """Yield how batch norm is compiled: for loads of 16 bytes (or of four elements), and of one."""
    for element, columns, relu in product(("float", "Half", "BFloat16", "double"), (0, 1), (0, 1)):
        wide = {"float": 4, "double": 2}.get(element, 4 if columns else 8)
        for vector in (wide, 1) if with_single else (wide,):
            yield {
                "ELEMENT": element,
                "VECTOR": vector,
                "COLUMNS": columns,
                "RELU": relu,
                "THREADS": threads,
            }


ELEMENTS = ("float", "Half", "BFloat16", "double")


def pooling():
    for element, index in product(ELEMENTS, ("unsigned", "unsigned long long")):
        yield {"ELEMENT": element, "INDEX": index, "THREADS": 256}


def convolution():
    """Yield the blocks of 1 to 64 output channels that come up, those of images and of weights."""
    blocks = {block_for(channels)[:2] for channels in (1, 3, 8, 16, 20, 32, 50, 64)}
    for (warps, outputs), element in product(sorted(blocks), ("float", "double")):
        for taps, strided in ((1, 0), (1, 1), (2, 0)):
            yield {
                "ELEMENT": element,
                "WARPS": warps,
                "OUTPUTS": outputs,
                "PIXELS": 4,
                "TAPS": taps,
                "STRIDED": strided,
            }


def conv_block():
    options = product(("float", "double"), (0, 1), ("unsigned", "unsigned long long"))
    for element, columns, index in options:
        yield {
            "ELEMENT": element,
            "VECTOR": 1,
            "COLUMNS": columns,
            "RELU": 1,
            "INDEX": index,
            "THREADS": 256,
        }


def cross_entropy():
    for element, lanes in product(ELEMENTS, (1, 32)):
        yield {"ELEMENT": element, "LANES": lanes, "THREADS": 256}


def relu():
    for element, size in zip(ELEMENTS, (4, 2, 2, 8), strict=True):
        for vector in (16 // size, 1):
            yield {"ELEMENT": element, "VECTOR": vector, "THREADS": 256}


#: File -> the definitions it is compiled with.
PROGRAMS = {
    "batch_norm.cu": list(batch_norm(256, with_single=True)),
    "batch_norm_teams.cu": list(batch_norm(128, with_single=False)),
    "convolution.cu": list(convolution()),
    "conv_block.cu": list(conv_block()),
    "cross_entropy.cu": list(cross_entropy()),
    "optimizers.cu": [
        {"ELEMENT": element, "CHUNK": 4096, "THREADS": 256} for element in ("float", "double")
    ],
    "pooling.cu": list(pooling()),
    "relu.cu": list(relu()),
    "running_statistics.cu": [{"THREADS": 128}],
}


def source(file, defines):
    return launch.source(file, **defines)
