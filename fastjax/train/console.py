"""What a run shows: a progress line in a terminal, and one line for each log record there and elsewhere."""

import math
import sys

from tqdm import tqdm

from fastjax.train.metrics import LogRecord

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"


class Console:
    """The output of one run; with `quiet` there is none. A file or pipe gets the lines without the progress line."""

    def __init__(self, total: int, start: int, quiet: bool) -> None:
        self.total = total
        self.quiet = quiet
        hidden = quiet or not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, bar_format=BAR, disable=hidden, dynamic_ncols=True, leave=False)
        self.bar.set_postfix_str("compiling")
        self.shown = ""

    def advance(self, seconds_left: float | None) -> None:
        """One more step has finished."""
        left = "compiled" if seconds_left is None else f"{tqdm.format_interval(seconds_left)} left"
        self.bar.set_postfix_str(f"{left}{self.shown}", refresh=False)
        self.bar.update()

    def write(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()  # a log file shows each line as it comes

    def record(self, record: LogRecord) -> None:
        """Shows a log record."""
        width = len(str(self.total))
        place = f"step {record['step']:{width}}/{self.total}"
        if "eval_loss" in record:
            self.write(f"{place}  eval loss {record['eval_loss']:.4f}, perplexity {record['eval_perplexity']:.2f}")
            return
        skipped = f", {record['skipped']} skipped" if record["skipped"] else ""
        loss, speed = f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tok/s"
        norm = "not finite" if math.isnan(record["grad_norm"]) else f"{record['grad_norm']:.3g}"
        self.write(f"{place}  {loss}, grad norm {norm}, lr {record['learning_rate']:.2e}, {speed}{skipped}")
        memory = f", {record['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in record else ""
        self.shown = f", {loss}{memory}"  # the rest stands in the line above, and 80 columns take no more

    def close(self) -> None:
        self.bar.close()
