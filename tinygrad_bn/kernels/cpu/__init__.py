"""Kernels for NumPy arrays: chunks that stay in cache, on as many threads as the process may use.

`numpy_*` and `numba_*` are the kernels that ops and optimizers name. What they share:

    threads, blas, quota    who works, and on how many processors
    memory                  large arrays in memory that was used before
    compiled                loops in machine code, made at first use and kept on disk
    *_loops                 the loops; that of an optimizer stands in its kernel
    updates                 what the kernels of optimizers serve, and in what pieces
    channel_blocks          a tensor in blocks, for NumPy, with a number for each channel
    channels                the same for compiled loops
    shares                  what a mask makes of a tensor
    rows                    rows that are normalized each by itself
    columns, planes         images as matrices, for products; images in chunks, for pools
    pools                   what the compiled pools serve, and sizes for their loops
    conv_block_plan         the order of pixels in a convolution block
    halves, stored          float16 and bfloat16 to float32 and back: in NumPy, in compiled loops

Start with `numpy_batch_norm`, and `numba_batch_norm` beside it.
"""
