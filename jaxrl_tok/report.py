"""A run directory in, one self-contained page out: report.html.

1. `read_rows` reads metrics.jsonl and samples.jsonl, forgiving a killed run.
2. `curve` picks one metric of one phase; `thin` keeps it to a few hundred
   points and `smooth` takes a centred moving mean.
3. `chart` draws curves as SVG; `reward_curve_svg` and `panels` call it.
4. `read_samples` keeps the greedy completions before and after, and the sampled
   ones of the first and the latest steps; `shade` colours a token by advantage.
5. `write_report` fills the template PAGE and replaces report.html in one move.

Completions are untrusted text. The page has no script and loads nothing, Jinja
escapes every string, and colours are made of numbers only. Never imports jax.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, islice, pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

BLUE, ORANGE, INK = "#3b82f6", "#e07b0c", "#717b87"  # seen on white and black
LATEST_STEPS, GROUPS, SAMPLES, TOKENS, PAIRS = 3, 3, 8, 600, 20  # what is shown
DARKEST = 0.62  # opacity of the largest advantage; text stays readable on it

PANELS = (  # phase, metric, heading, unit
  ("train", "entropy", "Entropy", "nats per token"),
  ("train", "kl", "KL to the reference", "nats"),
  ("train", "surrogate", "Surrogate loss", ""),
  ("train", "grad_norm", "Gradient norm", ""),
  ("train", "completions/mean_length", "Completion length", "tokens, mean"),
  ("train", "tokens_per_second", "Speed", "tokens per second"),
  ("train", "frac_reward_zero_std", "Groups without variance", "fraction"),
  ("train", "sampler_logp_gap", "Sampler log-prob gap", "nats"),
  ("warm_start", "loss", "Warm-start loss", "cross-entropy"),
)

Points = list[tuple[float, float]]


class Curve(NamedTuple):
  label: str
  points: Points
  colour: str
  width: float = 2.2
  opacity: float = 1.0
  dots: bool = False
  end: str | None = None  # a word to write beside the last value


# --- reading


def read_rows(path: Path) -> Iterator[dict]:
  """The JSON objects of a file, one a line; unfinished lines are skipped."""
  if not path.exists():
    return
  with path.open(encoding="utf-8", errors="replace") as lines:
    for line in lines:
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(row, dict):
        yield row


def read_text(path: Path, limit: int = 100_000) -> str:
  if not path.exists():
    return ""
  return clip(path.read_text(encoding="utf-8", errors="replace"), limit)


def clip(text: object, limit: int = 4000) -> str:
  text = "" if text is None else str(text)
  more = len(text) - limit
  return text if more <= 0 else f"{text[:limit]} … ({more} more characters)"


def number(value: object) -> float | None:
  """A finite float that a plot can hold, or None."""
  try:
    value = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return value if abs(value) < 1e30 else None  # false for nan too


def entries(value: object) -> list:
  return value if isinstance(value, list) else []


# --- curves


def curve(metrics: list[dict], phase: str, name: str) -> Points:
  """(step, value) in order of step; of a step's repetitions the last wins."""
  points = {}
  for row in metrics:
    if row.get("phase") == phase and name in row:
      points[number(row.get("step"))] = number(row[name])
  found = [(x, y) for x, y in points.items() if None not in (x, y)]
  return sorted(found)


def thin(points: Points, most: int = 400) -> Points:
  """At most `most` points: the means of equal runs of neighbours."""
  n, buckets = len(points), min(len(points), most)
  edges = [i * n // buckets for i in range(buckets + 1)] if n else []
  return [mean_point(points[i:j]) for i, j in pairwise(edges)]


def mean_point(points: Points) -> tuple[float, float]:
  xs, ys = zip(*points)
  return math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)


def smooth(points: Points, half: int) -> Points:
  """Each y becomes the mean of the `half` neighbours on either side and it."""
  sums = [0.0, *accumulate(y for _, y in points)]
  ranges = [(max(i - half, 0), min(i + half + 1, len(points)))
            for i in range(len(points))]
  return [(x, (sums[j] - sums[i]) / (j - i))
          for (x, _), (i, j) in zip(points, ranges)]


def figure(x: float) -> str:
  """A number for an axis or a card: 0.25, 1500, 12k, 3.2M."""
  for least, size, mark in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
    if abs(x) >= least:
      return f"{x / size:.3g}{mark}"
  if 0 < abs(x) < 1e-3:
    return re.sub("e-0*", "e-", f"{x:.3g}")
  return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def ticks(low: float, high: float, count: int, whole: bool = False) -> list:
  """Round numbers 1, 2 or 5 times a power of ten, covering low..high."""
  if high - low <= max(1e-9, 1e-6 * max(abs(low), abs(high))):
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high - low > 1e-9 else low + 1.0
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
  step = max(1, round(step)) if whole else step
  return [i * step
          for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def path_data(points: Points) -> str:
  first, *rest = [f"{x:.1f},{y:.1f}" for x, y in points]
  return f"M{first}" + (f"L{' '.join(rest)}" if rest else "h0")


def spread(ends: list[tuple[float, str]], gap: float = 14) -> list:
  """Moves labels apart that would overlap, keeping their order."""
  placed = []
  for y, text in sorted(ends):
    placed.append((max(y, placed[-1][0] + gap) if placed else y, text))
  return placed


# --- SVG


def tag(name: str, inside: str = "", **attributes: object) -> str:
  """One element. Attributes are escaped; `inside` is markup, see `words`."""
  pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
                  for key, value in attributes.items())
  return f"<{name}{pairs}>{inside}</{name}>" if inside else f"<{name}{pairs}/>"


def words(x: float, y: float, text: str, anchor: str = "start", **more) -> str:
  return tag("text", str(escape(text)), x=f"{x:.1f}", y=f"{y:.1f}",
             text_anchor=anchor, **{"class_": "ink", "fill": INK, **more})


def svg(inside: str, title: str, size: tuple[int, int]) -> str:
  return tag("svg", tag("title", str(escape(title))) + inside,
             xmlns="http://www.w3.org/2000/svg", role="img", aria_label=title,
             viewBox=f"0 0 {size[0]} {size[1]}", width=size[0], height=size[1],
             font_family="system-ui, -apple-system, 'Segoe UI', sans-serif",
             font_size=12, fill="none")


class Frame(NamedTuple):
  """Where a plot lies on its figure, and what its axes span."""
  left: float
  top: float
  right: float
  bottom: float
  x_ticks: list[float]
  y_ticks: list[float]
  x_low: float
  x_high: float

  def place(self, x: float, y: float) -> tuple[float, float]:
    low, high = self.y_ticks[0], self.y_ticks[-1]
    across = (x - self.x_low) / (self.x_high - self.x_low)
    up = (y - low) / (high - low)
    return (self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top))


def make_frame(curves: list[Curve], size: tuple[int, int],
               large: bool) -> Frame:
  xs, ys = zip(*(point for c in curves for point in c.points))
  x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
  near = 0.02 * (x_high - x_low)  # a tick just outside widens the axis to it
  x_ticks = [x for x in ticks(x_low, x_high, size[0] // (110 if large else 75),
                              whole=True) if x_low - near <= x <= x_high + near]
  y_low, y_high = min(ys), max(ys)
  if large and y_low >= 0 and y_high <= 1:
    y_low, y_high = 0, 1
  elif y_low > 0.8 * y_high > 0:  # small noise should look small
    y_low = 0
  left, top, right, bottom = (46, 34, 106, 42) if large else (50, 8, 62, 22)
  return Frame(left, top, size[0] - right, size[1] - bottom, x_ticks,
               ticks(y_low, y_high, size[1] // 50),
               min([x_low, *x_ticks]), max([x_high, *x_ticks]))


def chart(curves: list[Curve], title: str, size: tuple[int, int],
          large: bool = False) -> str:
  """Grid, curves, end values, and a strip for each step that can be hovered."""
  curves = [c for c in curves if c.points]
  if not curves:
    return svg(words(size[0] / 2, size[1] / 2, "no reward recorded", "middle"),
               title, size)
  frame = make_frame(curves, size, large)
  parts = grid(frame)
  for c in curves:
    at = [frame.place(*point) for point in c.points]
    parts += draw(c, at, dots=at)
  if large:
    parts += legend(curves, frame.left)
    parts += [words((frame.left + frame.right) / 2, size[1] - 6,
                    "training step", "middle")]
  parts += hover_strips(curves, frame, 80 if large else 32)
  ends = [(frame.place(*c.points[-1])[1],
           f"{c.end} {figure(c.points[-1][1])}".strip())
          for c in curves if c.end is not None]
  parts += [words(frame.right + 8, y + 4, text, font_weight=600)
            for y, text in spread(ends)]
  return svg("".join(parts), title, size)


def grid(frame: Frame) -> list[str]:
  line = {"class_": "grid", "stroke": INK, "stroke_opacity": 0.22}
  parts = []
  for value in frame.y_ticks:
    _, y = frame.place(frame.x_low, value)
    parts += [tag("path", d=f"M{frame.left},{y:.1f}H{frame.right}", **line),
              words(frame.left - 7, y + 4, figure(value), "end")]
  for value in frame.x_ticks:
    x, _ = frame.place(value, frame.y_ticks[0])
    parts += [tag("path", d=f"M{x:.1f},{frame.bottom}v4", **line),
              words(x, frame.bottom + 17, figure(value), "middle")]
  return parts


def draw(c: Curve, points: Points, dots: Points) -> list[str]:
  parts = [tag("path", d=path_data(points), stroke=c.colour,
               stroke_width=c.width, stroke_opacity=c.opacity,
               stroke_linejoin="round", stroke_linecap="round")]
  if c.dots and len(dots) <= 60:
    parts += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.2, fill=c.colour)
              for x, y in dots]
  return parts


def legend(curves: list[Curve], x: float) -> list[str]:
  parts = []
  for c in curves:
    parts += draw(c, [(x, 13), (x + 20, 13)], dots=[(x + 10, 13)])
    parts.append(words(x + 27, 17, c.label))
    x += 27 + 6.3 * len(c.label) + 24
  return parts


def hover_strips(curves: list[Curve], frame: Frame, most: int) -> list[str]:
  """Invisible columns whose <title> says the values there, without a script."""
  parts, tables = [], [(c.label, thin(c.points, most)) for c in curves]
  xs = max((table for _, table in tables), key=len)
  middles = [(a + b) / 2 for (a, _), (b, _) in pairwise(xs)]
  edges = [frame.x_low, *middles, frame.x_high]
  for (x, _), low, high in zip(xs, edges, edges[1:]):
    near = [(label, min(table, key=lambda point: abs(point[0] - x)))
            for label, table in tables]
    text = "\n".join([f"step {x:.0f}", *(
      f"{label}: {figure(y)}" + ("" if at == x else f" (step {at:.0f})")
      for label, (at, y) in near)])
    (left, _), (right, _) = frame.place(low, 0), frame.place(high, 0)
    parts.append(tag(
      "rect", tag("title", str(escape(text))), class_="strip", x=f"{left:.1f}",
      y=frame.top, width=f"{right - left:.1f}",
      height=frame.bottom - frame.top, fill=INK, fill_opacity=0))
  return parts


# --- what the page shows


def reward_curve_svg(metrics: list[dict]) -> str:
  """Reward in training and on held-out prompts, as a figure on its own.

  Its colours are explicit and lie midway, so that it can be read on a white
  page and on a black one.
  """
  reward = curve(metrics, "train", "reward")
  held_out = curve(metrics, "eval", "eval/reward")
  half = max(2, len(reward) // 30)
  each = "each step" if len(reward) <= 400 else (
    f"means of {math.ceil(len(reward) / 400)} steps")
  return chart([
    Curve(f"training reward, {each}", thin(reward), BLUE, width=1.2,
          opacity=0.5),
    Curve(f"moving mean of {2 * half + 1} steps", thin(smooth(reward, half)),
          BLUE, end="train"),
    Curve("held-out reward, greedy", thin(held_out), ORANGE, dots=True,
          end="held-out"),
  ], "Training reward and held-out reward by step", (920, 340), large=True)


def panels(metrics: list[dict]) -> list[dict]:
  shown = []
  for phase, name, heading, unit in PANELS:
    points = thin(curve(metrics, phase, name), 300)
    if points:
      drawn = chart([Curve(name, points, BLUE, width=1.6, end="")],
                    f"{heading} by step", (300, 150))
      shown.append({"heading": heading, "unit": unit, "svg": Markup(drawn)})
  return shown


def time_split(metrics: list[dict]) -> list[dict]:
  """Seconds spent sampling, scoring and updating, and their shares."""
  names = ("rollout", "score", "update")
  spent = [math.fsum(y for _, y in curve(metrics, "train", f"time/{name}"))
           for name in names]
  whole = sum(spent)
  return [{"name": name, "seconds": duration(seconds),
           "percent": round(100 * seconds / whole, 2)}
          for name, seconds in zip(names, spent) if whole > 0 <= seconds]


def duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.3g} s"
  minutes, left = divmod(round(seconds), 60)
  return (f"{minutes} min {left} s" if minutes < 60 else
          f"{minutes // 60} h {minutes % 60} min")


def headline(metrics: list[dict]) -> dict[str, str]:
  """Cards for a run whose caller gave no summary."""
  held_out = curve(metrics, "eval", "eval/reward")
  reward = curve(metrics, "train", "reward")
  seconds = [number(row.get("time")) or 0.0 for row in metrics]
  cards = {}
  if held_out:
    cards["held-out reward, before → after"] = (
      f"{figure(held_out[0][1])} → {figure(held_out[-1][1])}")
  if reward:
    cards["training reward, last step"] = figure(reward[-1][1])
    cards["training steps"] = f"{len(reward):,}"
  if metrics:
    cards["time"] = duration(max(seconds))
  return cards


class Samples(NamedTuple):
  before: dict[str, dict]  # by prompt
  after: dict[str, dict]
  train: dict[int, list[dict]]  # by step: the first and the latest few


def read_samples(path: Path) -> Samples:
  samples, previous = Samples({}, {}, {}), None
  for row in read_rows(path):
    split, step = row.get("split"), number(row.get("step"))
    if split in ("before", "after"):
      getattr(samples, split)[str(row.get("prompt"))] = row
    elif split == "train" and step is not None:
      if step != previous:  # a step met again was resumed: it starts afresh
        samples.train[step], previous = [], step
      samples.train.setdefault(step, []).append(row)
      if len(samples.train) > LATEST_STEPS + 1:
        del samples.train[sorted(samples.train)[1]]
  return samples


def greedy_pairs(samples: Samples) -> dict:
  prompts = list(dict.fromkeys([*samples.before, *samples.after]))
  both = (samples.before, samples.after)
  rows = []
  for prompt in prompts[:PAIRS]:
    found = [side.get(prompt) for side in both]
    answer = next((r["answer"] for r in found if r and "answer" in r), None)
    rows.append({"prompt": clip(prompt), "answer": clip(answer),
                 "sides": [r and shown_sample(r) for r in found]})
  right = [sum((number(r.get("reward")) or 0) > 0.5 for r in side.values())
           for side in both]
  return {"rows": rows, "right": right, "of": [len(side) for side in both],
          "more": len(prompts) - len(rows)}


def shown_sample(row: dict) -> dict:
  reward = number(row.get("reward"))
  return {"completion": clip(row.get("completion")),
          "reward": "not scored" if reward is None else figure(reward),
          "mark": None if reward is None else
                  "right" if reward > 0.5 else "wrong"}


# --- credit: one token, one colour


def shade(advantage: object, largest: float) -> str:
  """CSS for a token: its sign picks the hue, its share of the largest alpha.

  Blue where the token is pushed to be likelier, orange where less likely.
  Built from numbers only, because everything else in a sample is untrusted.
  """
  advantage = number(advantage) or 0.0
  if not advantage or largest <= 0:
    return ""
  alpha = DARKEST * min(1.0, abs(advantage) / largest)
  red, green, blue = (37, 99, 235) if advantage > 0 else (234, 88, 12)
  return f"background:rgba({red},{green},{blue},{alpha:.4f})"


def visible(token: object) -> Markup:
  """The token escaped, with marks where nothing would be seen."""
  text = "".join(
    f"⟨U+{ord(c):04X}⟩" if c not in "\n\r\t" and unicodedata.category(c) in
    ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(token)[:200])
  marks = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\xa0": "⍽"}
  marked = re.sub("[ \n\r\t\xa0]", lambda m: f"<i>{marks[m[0]]}</i>",
                  str(escape(text)))
  return Markup(marked or "<i>·</i>")


def shown_tokens(row: dict, largest: float) -> list[dict]:
  columns = [entries(row.get(k)) for k in ("logp", "rewards", "advantage")]
  tokens = entries(row.get("tokens"))
  columns = [column[:len(tokens)] for column in columns]
  shown = []
  for token, *values in islice(zip_longest(tokens, *columns), TOKENS):
    logp, reward, advantage = map(number, values)
    said = ["–" if v is None else f"{v:+.3f}" for v in (reward, advantage)]
    chance = "–" if logp is None else (
      f"{logp:.3f} (p = {math.exp(min(logp, 0)):.3g})")
    shown.append({
      "text": visible(token), "style": shade(advantage, largest),
      "paid": bool(reward), "newline": "\n" in str(token),
      "title": f"{clip(repr(token), 200)}\nlog-prob {chance}\n"
               f"reward {said[0]}\nadvantage {said[1]}"})
  return shown


def credit(samples: Samples) -> dict:
  """Steps, newest first; each has groups (one a prompt) of shaded samples."""
  largest = max((abs(number(a) or 0.0) for rows in samples.train.values()
                 for row in rows for a in entries(row.get("advantage"))),
                default=0.0)
  steps = []
  for step in sorted(samples.train, reverse=True):
    groups = {}
    for row in samples.train[step]:
      groups.setdefault(str(row.get("prompt")), []).append(row)
    steps.append({"step": f"{step:.0f}", "more": max(len(groups) - GROUPS, 0),
                  "groups": [shown_group(prompt, groups[prompt], largest)
                             for prompt in list(groups)[:GROUPS]]})
  return {"steps": steps, "largest": figure(largest), "legend": [
    shade(largest * i / 4, largest) for i in range(-4, 5)]}


def shown_group(prompt: str, rows: list[dict], largest: float) -> dict:
  return {
    "prompt": clip(prompt), "answer": clip(rows[0].get("answer")),
    "more": max(len(rows) - SAMPLES, 0),
    "rows": [{**shown_sample(row), "tokens": shown_tokens(row, largest),
              "more": max(len(entries(row.get("tokens"))) - TOKENS, 0)}
             for row in rows[:SAMPLES]]}


# --- the page


@cache
def template() -> jinja2.Template:
  return jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined).from_string(PAGE)


def write_report(run_dir: str | Path, title: str = "Training report",
                 summary: dict | None = None) -> Path:
  """Writes run_dir/report.html from the files of the run and returns its path.

  `summary` maps a label to a text, shown as cards in that order; without one
  the cards are read off the metrics. Missing files leave a line in their place.
  """
  run_dir = Path(run_dir)
  metrics = list(read_rows(run_dir / "metrics.jsonl"))
  samples = read_samples(run_dir / "samples.jsonl")
  page = template().render(
    title=title, style=Markup(STYLE),
    cards=headline(metrics) if summary is None else summary,
    reward=Markup(reward_curve_svg(metrics)) if any(
      "reward" in row or "eval/reward" in row for row in metrics) else None,
    panels=panels(metrics), times=time_split(metrics),
    pairs=greedy_pairs(samples), credit=credit(samples),
    command=read_text(run_dir / "command.txt").strip(),
    files=[(name, text) for name in ("config.yaml", "env.json")
           if (text := read_text(run_dir / name))])
  path = run_dir / "report.html"
  part = run_dir / f".report.{os.getpid()}.html"
  part.write_text(page, encoding="utf-8", errors="replace")
  os.replace(part, path)
  return path


STYLE = """
:root { color-scheme: light dark; --page: #fff; --box: #f6f8fa; --line: #d8dee4;
  --text: #1f2328; --soft: #59636e; --good: #1a7f37; --bad: #bc4c00;
  --a: #3b82f6; --b: #8b93a0; --c: #e07b0c }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --box: #161b22;
  --line: #30363d; --text: #e6edf3; --soft: #9da7b3; --good: #3fb950;
  --bad: #f0883e } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 960px; padding: 32px 20px 64px;
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px }
h2 { font-size: 18px; margin: 44px 0 4px }
p { margin: 0 0 12px } .soft { color: var(--soft) } small { font-size: 13px }
code, pre, .text { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
  monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate }
pre { background: var(--box); border: 1px solid var(--line); margin: 8px 0;
  border-radius: 8px; padding: 12px 14px; max-height: 480px; overflow: auto }
.cards { display: grid; gap: 12px; margin: 20px 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)) }
.cards div { display: flex; flex-direction: column-reverse;
  justify-content: flex-end; background: var(--box); padding: 12px 16px;
  border: 1px solid var(--line); border-radius: 8px }
dt { font-size: 13px; color: var(--soft) }
dd { margin: 0; font-size: 20px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto }
svg .ink { fill: var(--soft) } svg .ink[font-weight] { fill: var(--text) }
svg .grid { stroke: var(--line); stroke-opacity: 1 }
svg .strip:hover { fill-opacity: .12 }
.panels { display: grid; gap: 20px 24px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(max(200px, 28%), 1fr)) }
figure { margin: 0 } figcaption { font-size: 13px; font-weight: 600 }
figcaption span { color: var(--soft); font-weight: 400; margin-left: 6px }
.bar { display: flex; height: 22px; margin: 12px 0 8px; gap: 2px;
  border-radius: 6px; overflow: hidden }
.key { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13px }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 7px }
.rollout { background: var(--a) } .score { background: var(--c) }
.update { background: var(--b) }
.scroll { overflow-x: auto } .wide svg { min-width: 640px }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: 13px; color: var(--soft); font-weight: 600 }
th, td { padding: 5px 14px 7px 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
td .text { display: inline-block; vertical-align: top; max-height: 220px;
  overflow-y: auto }
td .mark { vertical-align: top; font-size: 13px }
.right { color: var(--good) } .wrong { color: var(--bad) }
.mark { font-weight: 700; margin-right: 7px }
details { margin: 10px 0 } summary { cursor: pointer; font-weight: 600 }
.scale { display: inline-flex; vertical-align: -4px; margin: 0 8px;
  border: 1px solid var(--line); border-radius: 4px; overflow: hidden }
.scale i { width: 20px; height: 16px }
.group { border: 1px solid var(--line); border-radius: 8px; margin: 10px 0;
  padding: 10px 14px }
.sample { display: grid; grid-template-columns: 74px 1fr; padding: 3px 0;
  font-size: 13px; align-items: baseline }
.tokens span { padding: 2px 0; border-radius: 2px; cursor: default }
.tokens span:hover { outline: 1.5px solid var(--text) }
.tokens .paid { text-decoration: underline 2px; text-underline-offset: 4px }
.tokens i { font-style: normal; opacity: .6 } .tokens { line-height: 1.8 }
"""

PAGE = """{% macro mark(side) %}
{% if side.mark %}<span class="mark {{ side.mark }}" role="img"
  aria-label="{{ side.mark }}"
  title="{{ side.mark }}, reward {{ side.reward }}">
{{- "✓" if side.mark == "right" else "✗" }}</span>{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if cards %}
<dl class="cards">
{% for label, text in cards.items() %}
<div><dt>{{ label }}</dt><dd>{{ text }}</dd></div>
{% endfor %}
</dl>
{% endif %}

<h2>Reward</h2>
{% if reward %}<div class="scroll wide">{{ reward }}</div>{% else %}
<p class="soft">no rewards recorded</p>{% endif %}

{% if panels %}
<h2>While it trained</h2>
<div class="panels">
{% for p in panels %}
<figure><figcaption>{{ p.heading }}<span>{{ p.unit }}</span></figcaption>
{{ p.svg }}</figure>
{% endfor %}
</div>
{% endif %}

{% if times %}
<h2>Where the time went</h2>
<div class="bar" role="img" aria-label="Time by part of a step">
{% for t in times %}
<div class="{{ t.name }}" style="width:{{ t.percent }}%"
  title="{{ t.name }}: {{ t.seconds }}"></div>
{% endfor %}
</div>
<div class="key">
{% for t in times %}
<span><i class="{{ t.name }}"></i>{{ t.name }}
<span class="soft">{{ t.seconds }}, {{ "%.1f" | format(t.percent) }} %</span>
</span>
{% endfor %}
</div>
{% endif %}

<h2>Held-out completions, before and after</h2>
{% if pairs.rows %}
<p class="soft"><small>Greedy. Right (a reward above 0.5):
{{ pairs.right[0] }} of {{ pairs.of[0] }} before,
{{ pairs.right[1] }} of {{ pairs.of[1] }} after.
{% if pairs.more %}The first {{ pairs.rows | length }} are shown.{% endif %}
</small></p>
<div class="scroll"><table>
<thead><tr><th>prompt</th><th>answer</th><th>before</th><th>after</th></tr>
</thead><tbody>
{% for row in pairs.rows %}
<tr><td><span class="text">{{ row.prompt }}</span></td>
<td><span class="text">{{ row.answer }}</span></td>
{% for side in row.sides %}
<td>{% if side %}{{ mark(side) }}<span class="text">{{ side.completion }}</span>
{% else %}<span class="soft">–</span>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p class="soft">no held-out completions recorded</p>
{% endif %}

<h2>Credit, token by token</h2>
{% if credit.steps %}
<p class="soft"><small>Each token is shaded by its advantage: blue ones are
pushed to be likelier, orange ones less likely. An underlined token received
a reward. Hover one for its numbers.<br>
advantage −{{ credit.largest }}<span class="scale">
{% for style in credit.legend %}
<i{% if style %} style="{{ style }}"{% endif %}></i>
{%- endfor %}
</span>+{{ credit.largest }}</small></p>
{% for step in credit.steps %}
<details{% if loop.first or loop.last %} open{% endif %}>
<summary>step {{ step.step }}</summary>
{% for group in step.groups %}
<div class="group">
<div class="sample"><span class="soft">prompt</span>
<span class="text">{{ group.prompt }}</span></div>
{% if group.answer %}
<div class="sample"><span class="soft">answer</span>
<span class="text">{{ group.answer }}</span></div>
{% endif %}
{% for row in group.rows %}
<div class="sample"><span>{{ mark(row) }}{{ row.reward }}</span>
<span class="text tokens">
{%- for t in row.tokens -%}
<span title="{{ t.title }}"{% if t.paid %} class="paid"{% endif %}
{%- if t.style %} style="{{ t.style }}"{% endif %}>{{ t.text }}</span>
{%- if t.newline %}<br>{% endif %}
{%- endfor %}
{% if row.more %} … {{ row.more }} more tokens{% endif %}
</span></div>
{% endfor %}
{% if group.more %}<small class="soft">{{ group.more }} more samples</small>
{% endif %}
</div>
{% endfor %}
{% if step.more %}<small class="soft">{{ step.more }} more prompts</small>
{% endif %}
</details>
{% endfor %}
{% else %}
<p class="soft">no training samples recorded</p>
{% endif %}

<h2>How it was run</h2>
{% if command %}<pre>{{ command }}</pre>{% endif %}
{% for name, text in files %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% else %}
<p class="soft">no configuration recorded</p>
{% endfor %}
</main>
</body>
</html>
"""
