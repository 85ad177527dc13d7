"""Run examples/digits.py twice, by plain Python and by ``twofold run``, and compare.

Both runs start from the same seed. Figures of speed are of one machine at one time: the ratio is what counts.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "digits.py"
SECONDS = 40
"""Length of the eager run: kernels take 10 to 30 s to compile, and the steady state is to be seen."""


@dataclass(frozen=True)
class Outcome:
    epochs: int
    seconds: list[float]
    loss: float
    parameters: dict[str, torch.Tensor]

    @property
    def steps_per_second(self) -> float:
        """Over the last third of the run, evaluation after each epoch included."""
        last = self.seconds[len(self.seconds) * 2 // 3 :]
        return (len(last) - 1) / (last[-1] - last[0])


def run(name: str, command: list[str], folder: Path) -> Outcome:
    """Run ``command`` with its output in a log; leave with that log's end if it fails."""
    metrics, log = folder / f"{name}.json", folder / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run([*command, "--out", str(metrics)], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        sys.exit(f"{tail}\nthe {name} run failed with status {done.returncode}; all of its output: {log}")
    read = json.loads(metrics.read_text())
    return Outcome(read["epochs"], read["seconds"], read["loss"], torch.load(metrics.with_suffix(".pt")))


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def table(eager: Outcome, twofold: Outcome) -> str:
    def row(what: str, first: float, second: float, form: str) -> str:
        return f"  {what:<38}{first:>12{form}}{second:>12{form}}"

    speeds = eager.steps_per_second, twofold.steps_per_second
    tenths = eager.seconds[9], twofold.seconds[9]
    return "\n".join(
        [
            f"  {'':<38}{'eager':>12}{'twofold':>12}{'ratio':>9}",
            f"{row('steps per second, last third of run', *speeds, '.1f')}{speeds[1] / speeds[0]:>9.2f}",
            f"{row('seconds until the tenth step', *tenths, '.3f')}{tenths[1] / tenths[0]:>9.2f}",
            row("final loss", eager.loss, twofold.loss, ".6f"),
            f"  {'largest difference of any parameter':<38}"
            f"{largest_difference(eager.parameters, twofold.parameters):>24.2e}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a training script under plain Python and under Twofold.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"length of the eager run (default {SECONDS})")
    parser.add_argument("--numerics", default="fused", help="fused or exact")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for logs, metrics and the report")
    options = parser.parse_args()
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.html"

    script = [sys.executable, str(SCRIPT), "--log-every", "1000"]
    print(f"examples/digits.py on {torch.get_num_threads()} threads\nrunning it eagerly ...", flush=True)
    eager = run("eager", [*script, "--epochs", "100000", "--seconds", str(options.seconds)], folder)
    print(f"  {eager.epochs} epochs in {eager.seconds[-1]:.0f} s\nrunning it under Twofold ...", flush=True)
    script[1:1] = ["-m", "twofold", "run", "--numerics", options.numerics, "--report", str(report)]
    twofold = run("twofold", [*script, "--epochs", str(eager.epochs)], folder)
    print(f"  {twofold.epochs} epochs in {twofold.seconds[-1]:.0f} s\n")
    print(table(eager, twofold))
    if options.numerics == "fused":
        print("\n  Fused kernels round differently, and training amplifies it step by step.")
        print("  Bit for bit: python examples/demo.py --numerics exact")
    print(f"\nwhat ran where and why: {report}")


if __name__ == "__main__":
    main()
