"""Step time of methods on the paper's network, as ratios to the network without normalisation.

    python benchmarks/step_time.py --batch-sizes 1,8,50 --seconds 120

Forward, backward and SGD step, eager, all methods interleaved in one process (see normprop.experiments.timing); the
median ratio over the rounds with its quartiles.
"""

import argparse
import platform

import torch

from normprop import models
from normprop.experiments.timing import step_times


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nin")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--methods", default="none,batch,normprop,normprop-paper")
    parser.add_argument("--batch-sizes", default="1,8,50")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for each batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"{options.model}, width {options.width:g}, 3x32x32, float32, eager; torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, {options.device}, {machine}\n")
    print("| batch | method | ratio to none | quartiles | ms |\n| --- | --- | --- | --- | --- |")
    for batch_size in (int(size) for size in options.batch_sizes.split(",")):
        images = torch.randn(batch_size, 3, 32, 32, device=options.device)
        labels = torch.randint(10, (batch_size,), device=options.device)
        networks = {
            method: models.create(options.model, (3, 32, 32), 10, norm=method, width=options.width).to(options.device)
            for method in options.methods.split(",")
        }
        for time in step_times(networks, images, labels, options.seconds):
            print(
                f"| {batch_size} | {time.method} | {time.ratio:.3f} | {time.low:.3f} to {time.high:.3f} "
                f"| {time.milliseconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
