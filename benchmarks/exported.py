"""Time and memory of the exported default model against the model itself.

    python benchmarks/exported.py FOLDER -o benchmarks/exported.json

FOLDER contains model.onnx and model.pt2, as written by ``upfeat export``. Times are medians of
processor time on one thread; the models take turns. Memory is the growth of a process's peak
during one image, measured in a separate process for each model. Loading is timed once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

SIDES = (224, 448)
ROUNDS = 3


def load(name, folder):
    """Load a model by its file name, or the unexported model: (1, 3, H, W) -> features."""
    if name == "model":
        import upfeat

        return upfeat.load(upsampler="detail")
    if name == "model.pt2":
        return torch.export.load(folder / name).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / name, options)
    return lambda x: session.run(None, {"image": x.numpy()})[0]


def peak():
    # The peak of getrusage is not used, because a process inherits it from its parent.
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in one)
    return int(line.split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--memory", nargs=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        run, side = load(options.memory[0], options.folder), int(options.memory[1])
        with torch.no_grad():
            run(torch.rand(1, 3, 64, 80))
            before = peak()
            run(torch.rand(1, 3, side, side))
        print(peak() - before)
        return
    names = ["model", "model.onnx", "model.pt2"]
    rows = []
    loaded, loading = {}, {}
    for name in names:
        start = time.process_time()
        loaded[name] = load(name, options.folder)
        loading[name] = time.process_time() - start
    for side in SIDES:
        x, times = torch.rand(1, 3, side, side), {name: [] for name in names}
        with torch.no_grad():
            for turn in range(ROUNDS + 1):
                for name in names:
                    start = time.process_time()
                    loaded[name](x)
                    if turn:
                        times[name].append(time.process_time() - start)
        for name in names:
            command = [sys.executable, __file__, str(options.folder), "--memory", name, str(side)]
            grown = float(subprocess.run(command, capture_output=True, check=True).stdout)
            seconds = statistics.median(times[name])
            row = {"form": name, "side": side, "seconds": seconds, "megabytes": grown}
            rows.append(
                {key: one if isinstance(one, str) else round(one, 4) for key, one in row.items()}
            )
            print(rows[-1], flush=True)
    if options.output:
        found = {
            "threads": 1,
            "torch": torch.__version__,
            "loading": {name: round(value, 2) for name, value in loading.items()},
            "bytes": {name: (options.folder / name).stat().st_size for name in names[1:]},
            "rows": rows,
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
