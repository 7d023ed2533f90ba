"""Trains a small convolutional network with batch norm on Fashion-MNIST: `make train` runs this.

    python examples/fashion_mnist.py                             the tutorial's recipe
    python examples/fashion_mnist.py --recipe modern             today's habits, same network
    python examples/fashion_mnist.py --evaluate tutorial-seed0   score saved weights again
    python examples/fashion_mnist.py --device cuda               on a GPU, as one CUDA graph a step

A run leaves config.json, metrics.jsonl, model.safetensors and curves.png in its folder below runs/.
Ctrl-C ends it early and keeps what there is. `--help` explains every flag.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _console import Progress, clean_errors, warn
from _options import parse
from _recipes import RECIPES, Recipe, network
from _runs import Run, find

import tinygrad_bn as tg
from tinygrad_bn import data, nn, optim
from tinygrad_bn import functional as F

LOG_EVERY = 10
# Fixed, and not --batch-size: the last bits of a sum depend on how it is cut, and `--evaluate` must
# find the very loss that training printed.
TEST_BATCH = 500

Arrays = tuple[Any, Any]  # images (N, 28, 28) and labels (N,), both uint8
Batches = Iterable[tuple[tg.Tensor, tg.Tensor]]


def pixels(images: tg.Tensor, recipe: Recipe, options: argparse.Namespace) -> tg.Tensor:
    """Return uint8 images (N, 28, 28) as the network takes them: floating, scaled, one channel."""
    shape = (-1, 28, 28, 1) if options.layout == "NHWC" else (-1, 1, 28, 28)
    x = images.astype(options.dtype).reshape(shape) / 255
    return (x - recipe.pixel_mean) / recipe.pixel_deviation


def train(
    model: nn.Module, optimizer: optim.Optimizer, batches: Batches, options: argparse.Namespace
) -> Iterator[tuple[float, float]]:
    """Yield the loss and the accuracy on each batch, measured before the step it leads to."""
    recipe = RECIPES[options.recipe]
    schedule = recipe.schedule(optimizer, options.steps)

    def step(images: tg.Tensor, labels: tg.Tensor) -> tuple[tg.Tensor, tg.Tensor]:
        logits = model(pixels(images, recipe, options))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        return loss, F.accuracy(logits, labels)

    on_gpu = options.device != "cpu"
    if options.capture and on_gpu:
        print("Training with the step captured as one CUDA graph (--no-capture does without)")
        step = tg.capture(step)
    unread = []
    for done, (images, labels) in enumerate(batches, 1):
        # Copies: what a captured step returns is overwritten by its next call.
        unread.append([result.copy() for result in step(images, labels)])
        # Whoever reads a value waits for the GPU to get there, so there it is done now and then.
        if not on_gpu or done % LOG_EVERY == 0 or options.steps == done or is_tested(done, options):
            yield from ((loss.item(), accuracy.item()) for loss, accuracy in unread)
            unread.clear()


def is_tested(done: int, options: argparse.Namespace) -> bool:
    """Return whether the test images are scored after so many steps."""
    return done % options.test_every == 0 and done < options.steps


@tg.no_grad()
def evaluate(model: nn.Module, arrays: Arrays, options: argparse.Namespace) -> tuple[float, float]:
    """Return loss and accuracy over all of `arrays`, with the moving statistics."""
    recipe = RECIPES[options.recipe]
    loss = hits = count = 0.0
    model.eval()
    for images, labels in data.DataLoader(arrays, TEST_BATCH, device=options.device):
        logits = model(pixels(images, recipe, options))
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += round(F.accuracy(logits, labels).item() * len(labels))
        count += len(labels)
    model.train()
    return loss / count, hits / count


def build(options: argparse.Namespace) -> tuple[nn.Module, optim.Optimizer]:
    """Return the network at its start, and what will train it."""
    recipe = RECIPES[options.recipe]
    tg.manual_seed(options.seed)
    model = network(options.layout)
    recipe.start(model)
    model.astype(options.dtype).to(options.device)
    return model, recipe.optimizer(model, options.learning_rate)


def fit(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batches: Batches,
    test_set: Arrays,
    options: argparse.Namespace,
    run: Run,
) -> bool:
    """Return whether training came to its end, after logging it to `run` and the console."""
    with Progress(options.steps) as progress:
        for step, (loss, accuracy) in enumerate(train(model, optimizer, batches, options)):
            run.log(step=step, loss=loss, accuracy=accuracy)
            if step % LOG_EVERY == 0:
                progress.line(f"Batch {step:d}, Loss: {loss:f}, Train acc {accuracy:f}")
            progress.advance(loss, accuracy)
            if not math.isfinite(loss):
                warn(f"the loss is {loss} at step {step}: try a smaller --learning-rate")
                return False
            done = step + 1
            if is_tested(done, options):
                test_loss, test_accuracy = evaluate(model, test_set, options)
                run.log(step=done, test_loss=test_loss, test_accuracy=test_accuracy)
    test_loss, test_accuracy = evaluate(model, test_set, options)
    run.log(step=options.steps, test_loss=test_loss, test_accuracy=test_accuracy)
    print(f"Test Loss: {test_loss:f}, Test acc {test_accuracy:f}")
    return True


def obtain(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    """Return the training and the test set; `options.data` then tells which one was had."""
    if options.data == "full":
        if options.data_dir is not None and not Path(options.data_dir).expanduser().is_dir():
            warn(f"--data-dir {options.data_dir}: no such folder; looking elsewhere")
        try:
            images, labels, test_images, test_labels = data.fashion_mnist(options.data_dir)
            return (images, labels), (test_images, test_labels)
        except data.DatasetNotFoundError as error:
            warn(
                f"{error}\n"
                "THE FULL FASHION-MNIST COULD NOT BE OBTAINED (THE REASONS STAND ABOVE). GOING ON "
                "WITH THE SMALL SAMPLE THAT SHIPS WITH THE PACKAGE: EXPECT A LOWER ACCURACY."
            )
            options.data = "sample"
    images, labels, test_images, test_labels = data.fashion_mnist_sample()
    return (images, labels), (test_images, test_labels)


def run_training(options: argparse.Namespace) -> int:
    """Return the exit status of a training run."""
    with clean_errors():
        model, optimizer = build(options)
        train_set, test_set = obtain(options)
        loader = data.DataLoader(
            train_set,
            options.batch_size,
            shuffle=True,
            drop_last=True,
            seed=options.seed,
            device=options.device,
        )
        run = Run(options)
    try:
        ended = fit(model, optimizer, loader.steps(options.steps), test_set, options, run)
        status = 0 if ended else 1
    except KeyboardInterrupt:
        warn("interrupted: keeping what there is")
        status = 130  # what a shell expects of an interrupted program
    run.save(model)
    run.draw(f"Fashion-MNIST, {options.recipe} recipe, seed {options.seed}")
    if options.data == "sample":
        warn(f"TRAINED ON THE SAMPLE: {len(train_set[0])} TRAINING, {len(test_set[0])} TEST IMAGES")
    print(f"Wrote {run.folder}")
    return status


def run_evaluation(options: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    """Return the exit status of scoring saved weights again."""
    with clean_errors():
        weights, settings = find(options.evaluate, options.output_dir)
        options = parse(arguments, settings)  # what is on the command line goes before settings
        model, _ = build(options)
        model.load_state_dict(nn.load(weights, device=options.device))
        _, test_set = obtain(options)
    print(f"Scoring {weights} on {len(test_set[0])} test images")
    loss, accuracy = evaluate(model, test_set, options)
    print(f"Test Loss: {loss:f}, Test acc {accuracy:f}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of the command line `arguments` (None: the program's own)."""
    options = parse(arguments)
    if options.evaluate is not None:
        return run_evaluation(options, arguments)
    return run_training(options)


if __name__ == "__main__":
    sys.exit(main())
