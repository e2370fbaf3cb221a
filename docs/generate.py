"""Write the generated tables of the documents: figures from benchmarks/*.json, settings from code.

A page holds ``<!-- generated: NAME ARGUMENTS -->`` and ``<!-- end -->``; what stands between is
replaced by what the function of that name returns. Figures within sentences are expressions of
:mod:`figures`. Pictures of PICTURES are drawn anew, too.

    python docs/generate.py            # writes pages
    python docs/generate.py --check    # ends with 1 where a page would change
"""

from __future__ import annotations

import re
import statistics
import sys
from importlib import import_module
from pathlib import Path

import diagram
import figures
from figures import data as _read

from upfeat.evaluation.tasks import find_task, list_tasks
from upfeat.implicit.config import FitConfig
from upfeat.settings import table

DOCS = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- generated: (\w+)([^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

RIVALS = {
    "ours": "ours (C++)",
    "tap_major": "shifted multiply-adds, weights (taps, H, W)",
    "pixel_major": "shifted multiply-adds, weights (H, W, taps)",
    "unfold": "unfold and einsum",
    "bilinear": "bilinear interpolation, no filter",
}
UPSAMPLERS = {
    "implicit": "implicit",
    "blended": "implicit, blended (the default)",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "joint_bilateral": "joint bilateral",
    "neighbourhood_efficientnet_lite0": "neighbourhood",
    "jbu_stack_efficientnet_lite0": "JBU stack",
    "detail_efficientnet_lite0": "detail",
    "detail_universal": "detail, universal",
}
TOKEN_ROWS = {
    "anyup_multi_backbone.pth": "AnyUp (multi-backbone)",
    "jafar_vit_small_patch14_dinov2.pth": "JAFAR (for DINOv2-S)",
    "detail_universal@early": "**detail_universal, `early=True`** (one pass, the default)",
    "detail_universal@2@early": "detail_universal, `passes=2, early=True`",
    "detail_universal@5": "detail_universal, `passes=5`",
    "detail_universal@5@early": "detail_universal, `passes=5, early=True`",
    "detail_universal@8@early": "detail_universal, `passes=8, early=True`",
}
GAINS = {
    "bilinear": "bilinear",
    "bilinear, on aligned features": "bilinear@+2",
    "classical joint bilateral": "joint_bilateral",
    "neighbourhood": "neighbourhood_efficientnet_lite0",
    "detail with a network on pixels (`early=False`)": "detail_efficientnet_lite0",
    'detail with the weights for any backbone (`upsampler="detail_universal"`)': "detail_universal",
    "**… with early layers**: the default for other backbones": "detail_universal@early",
    "**detail with a network on early layers**, aligned: the default": (
        "early_detail_efficientnet_lite0"
    ),
    "… and the mirror image (`passes=2`)": "early_detail_efficientnet_lite0@2",
    "… and the enlarged image (`passes=5`)": "early_detail_efficientnet_lite0@5",
    "… and its mirror image (`passes=8`)": "early_detail_efficientnet_lite0@8",
}
PICTURES = {"architecture.svg": diagram.architecture}


def settings(name: str) -> str:
    """The settings of a configuration, by its full name."""
    module, _, cls = name.rpartition(".")
    return table(getattr(import_module(module), cls))


def scores() -> str:
    """Every score of every task."""
    found = {
        one.label: one.meaning for name in list_tasks() for one in find_task(name).scores.values()
    }
    return _rows(["score", "meaning"], [[label, meaning] for label, meaning in found.items()])


def cpu_stack() -> str:
    """The JBU stack beside its rivals."""
    rows = _read("cpu-stack")["measurements"]
    ours, output = rows[0], 4 * 384 * 224**2
    return _rows(
        ["", "time", "of ours", "peak memory", "of the 77 MB output"],
        [
            [
                RIVALS[row["rival"]],
                _milliseconds(row["seconds"]),
                _ratio(row["seconds"] / ours["seconds"]),
                f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                _ratio(row["peak_bytes"] / output),
            ]
            for row in rows
        ],
    )


def cpu_operator_backward() -> str:
    """One stage forward and backward beside its rivals."""
    rows = _read("cpu-operator-backward")["measurements"]
    return _rows(
        ["", "time", "of ours"],
        [
            [
                RIVALS[row["rival"]],
                _milliseconds(row["seconds"]),
                _ratio(row["seconds"] / rows[0]["seconds"]),
            ]
            for row in rows
        ],
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def rivals(machine: str = "") -> str:
    """Published upsamplers beside the plain form of their mathematics, on one machine."""
    rows, base = [], 0.0
    for row in _read(f"rivals-{machine}" if machine else "rivals")["rows"]:
        if row["name"] not in ("detail", "bilinear") and row["way"] == "ours":
            base = row["processor_seconds"]
        size = f"{row['grid']}→{row['size']}"
        if row["seconds"] is None:
            rows.append([row["name"], row["way"], size, "not run", row["skipped"], "", ""])
            continue
        rows.append(
            [
                row["name"],
                row["way"],
                size,
                _milliseconds(row["seconds"]),
                _milliseconds(row["processor_seconds"]),
                _ratio(row["processor_seconds"] / base),
                "" if row["way"] in ("floor", "PyTorch") else _mebibytes(row["peak_bytes"]),
            ]
        )
    return _rows(["", "way", "size", "time", "processor", "of ours", "peak memory"], rows)


def rivals_memory() -> str:
    """Memory of published upsamplers beside their output and their plain form."""
    return _rows(
        ["", "channels", "size", "type", "output", "peak", "of the output", "of the plain form"],
        [
            [
                row["name"],
                str(row["channels"]),
                f"{row['grid']}→{row['size']}",
                row["dtype"],
                f"{row['output_bytes'] / 2**20:,.0f} MiB",
                f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                f"{row['peak_bytes'] / row['output_bytes']:.2f}",
                f"{row['peak_bytes'] / row['plain_bytes']:.2f}" if "plain_bytes" in row else "",
            ]
            for row in _read("rivals-memory")["rows"]
        ],
    )


def versions() -> str:
    """Every job of two versions of the code, timed by turns."""
    rows = []
    for name, row in _read("versions")["rows"].items():
        ratio = _ratio(row["before"] / row["now"])
        rows.append([name, _milliseconds(row["before"]), _milliseconds(row["now"]), ratio])
    return _rows(["", "before", "now", "times as fast"], rows)


def training_step() -> str:
    """A training step beside the same loss done otherwise."""
    parts = _read("training-step")["parts"]
    labels = {
        "jbu_stack": "JBU stack, ours",
        "jbu_stack, all channels, eager": "the same loss with all channels upsampled by shifted "
        "multiply-adds, projected last",
        "neighbourhood": "neighbourhood, ours",
        "backbone": "the backbone, beside each",
    }
    ours = parts["jbu_stack"]["seconds"]
    rows = [[labels[name], parts[name]["seconds"]] for name in labels]
    shown = [[label, f"{value:.3g}", _ratio(value / ours)] for label, value in rows]
    return _rows(["", "seconds", "ratio"], shown)


def consistency() -> str:
    """Errors of unseen views, with an attention downsampler fitted to each upsampler."""
    sets = _read("consistency")["sets"]
    rows = []
    for name in sets[0]["rows"]:
        cells = []
        for group in sets:
            found = [group["rows"][name][score] for score in ("error", "cosine")]
            cells.append(" / ".join(f"{one['mean']:.3f} ± {one['spread']:.3f}" for one in found))
        rows.append([name, *cells])
    head = ["", *(f"{group['data']}: view error / view cosine" for group in sets)]
    return _rows(head, rows)


def implicit_consistency() -> str:
    """Held-out loss of a fit beside upsamplers of one pass."""
    means = sorted(_read("implicit_consistency")["mean"].items(), key=lambda item: item[1])
    values = [f"**{means[0][1]:.3f}**", *(f"{value:.3f}" for _, value in means[1:])]
    return _rows([UPSAMPLERS[name] for name, _ in means], [values])


def implicit_reference() -> str:
    """Held-out loss of the fast fit beside the published recipe."""
    data = _read("implicit_reference")
    rows = []
    for row in data["rows"]:
        last, cost = row["reference"]["curve"][-1], row["reference"]["cpu_whole"]
        name = re.sub(r"^n\d+_|\.\w+$", "", row["photo"]).replace("_", " ")
        rows.append(
            [
                name,
                f"{row['fast']['mean']:.4f}",
                f"{last['mean']:.4f}",
                f"{last['own']:.4f}",
                f"{cost / row['fast']['cpu']:.0f}",
            ]
        )
    means = [f"{data[name]:.4f}" for name in ("fast_mean", "reference_mean", "reference_own")]
    rows.append(["mean of all", *means, f"{data['median_ratio']:.0f} (median)"])
    head = ["photograph", "fast", "published, mean", "published, own", "times the cost"]
    return _rows(head, rows)


def passes(part: str) -> str:
    """Temperatures, or passes of the backbone, over backbones and sets."""
    rows = []
    for group in _read("passes")[part]:
        rows.append([f"*{group['backbone']}: {group['data']}*", "", ""])
        for name, scores in group["rows"].items():
            own, transfer = (f"{scores[i]:.1f} / {scores[i + 1]:.1f}" for i in (0, 2))
            rows.append([name, own, transfer])
    return _rows(["", "own", "transfer"], rows)


def implicit_probes() -> str:
    """Probes on implicit features beside those on upsamplers of one pass."""
    rows: dict[str, list[str]] = {}
    for row in _read("implicit_probes")["rows"]:
        own = row["protocol"] == "own"
        if row["protocol"] not in ("own", "transfer"):
            continue
        for name in ("miou", "boundary_f", "boundary_miou") if own else ("miou", "boundary_f"):
            value = row["scores"][name]
            spread = f" ± {100 * value['spread']:.1f}" if own else ""
            rows.setdefault(UPSAMPLERS.get(row["upsampler"], row["upsampler"]), []).append(
                f"{100 * value['mean']:.1f}{spread}"
            )
    head = ["upsampler", "own: mIoU", "own: boundary F", "own: mIoU near boundaries"]
    head += ["transfer: mIoU", "transfer: boundary F"]
    return _rows(head, [[name, *values] for name, values in rows.items()])


SHARED = UPSAMPLERS | {
    "detail_universal@early": "detail, universal, `early=True`",
    "detail_universal@2@early": "detail, universal, `early=True, passes=2`",
    "detail_universal@5@early": "detail, universal, `early=True, passes=5`",
    "detail_universal@8@early": "detail, universal, `early=True, passes=8`",
    "detail_universal@5": "detail, universal, `passes=5`",
    "early_detail_efficientnet_lite0": "early detail (the default)",
    "early_detail_efficientnet_lite0@2": "early detail, `passes=2`",
    "early_detail_efficientnet_lite0@5": "early detail, `passes=5`",
    "early_detail_efficientnet_lite0@8": "early detail, `passes=8`",
    "implicit alone": "implicit, `share=1, translation=0`",
}


def implicit_share(part: str) -> str:
    """Probes on fits with more and less of one pass in them."""
    rows: dict[str, list[str]] = {}
    for row in _read("implicit_share")[part]["rows"]:
        label = re.sub(r"efficientnet_lite\d", "efficientnet_lite0", row["upsampler"])
        name = SHARED.get(label, f"implicit, `share={label.partition('@')[2]}`")
        if label == f"implicit@{FitConfig().share}":
            name = f"**{name}** (the default)"
        pair = (statistics.mean(row["scores"][score]) for score in ("miou", "boundary_f"))
        rows.setdefault(name, []).append(" / ".join(f"{100 * value:.1f}" for value in pair))
    return _rows(["", "own", "transfer"], [[name, *values] for name, values in rows.items()])


def implicit_slack() -> str:
    """Probes on fits with two values of ``slack``, the default first."""
    known = _read("implicit_share")
    parts = ("clothing", "aerial_roads")
    other = next(iter(known[parts[0]]["slack"]))
    rows = []
    for share in (0.35, 0.5, 0.65, 1.0):
        for slack in (str(FitConfig().slack), other):
            cells = []
            for part in parts:
                found = known[part]["slack"][slack]
                for protocol in ("own", "transfer"):
                    row = next(
                        row
                        for row in found["rows"]
                        if (row["upsampler"], row["protocol"]) == (f"implicit@{share}", protocol)
                    )
                    means = (statistics.mean(row["scores"][one]) for one in ("miou", "boundary_f"))
                    cells.append(" / ".join(f"{100 * value:.1f}" for value in means))
            rows.append([f"`share={share}, slack={slack}`", *cells])
    heads = ["", "clothing: own", "transfer", "aerial roads: own", "transfer"]
    return _rows(heads, rows)


def implicit_gains() -> str:
    """What a fit returns by default less other ways, in points."""
    others = ["bilinear", "detail_universal", "detail_universal@5"]
    others += [f"early_detail_efficientnet_lite0{passes}" for passes in ("", "@2", "@5", "@8")]
    chosen = f"implicit@{FitConfig().share}"
    rows = []
    for other in [*others, "implicit alone"]:
        cells = []
        for part in ("clothing", "aerial_roads"):
            for protocol in ("own", "transfer"):
                place = part, chosen, protocol
                gains = [
                    figures.implicit_share(*place, one, other) for one in ("miou", "boundary_f")
                ]
                cells.append(" / ".join(figures.plain(f"{gain:+.1f}") for gain in gains))
        rows.append([SHARED[other], *cells])
    return _rows(["", "clothing: own", "transfer", "aerial roads: own", "transfer"], rows)


def earlier(name: str) -> str:
    """A measurement of former days, of which the figures were kept and the raw results were not."""
    data = _read("earlier")[name]
    several = "commits" if " to " in data["commit"] else "commit"
    when = f"Measured {data['measured']}, {several} {data['commit']}; raw results were not kept."
    return f"{_rows(data['head'], data['rows'])}\n\n*{when}*"


def gains() -> str:
    """The README's extract of the probes on EfficientNet-Lite0."""
    sets = [
        _read("probes")[f"EfficientNet-Lite0: {name}"]["protocols"]
        for name in ("clothing", "aerial roads")
    ]
    rows = []
    for label, name in GAINS.items():
        cells = [[_pair(part[one].get(name)) for one in ("own", "transfer")] for part in sets]
        rows.append([label, *(f"{own}, transfer {transfer}" for own, transfer in cells)])
    return _rows(["", "photographs of people", "aerial roads"], rows)


def _pair(scores: dict[str, list[float]] | None) -> str:
    if scores is None:
        return "not measured"
    return "{:.1f} ({:.1f})".format(*(100 * scores[name][0] for name in ("miou", "boundary_f")))


def probes(*titles: str) -> str:
    """Probes of ``upfeat eval`` whose titles begin so, gathered by benchmarks/collect_probes.py."""
    rows = []
    for title, group in _read("probes").items():
        if not title.startswith(" ".join(titles)):
            continue
        train, test = group["images"]
        rows.append([f"*{title} ({train} + {test} images)*", "", ""])
        names = list(group["protocols"]["own"])
        for name in names:
            shown = (_scores(group["protocols"][part][name]) for part in ("own", "transfer"))
            rows.append([name, *shown])
    return _rows(["", "own", "transfer"], rows)


def token_probes(*titles: str) -> str:
    """Probes on the tokens of a transformer, with the processor time of each upsampler."""
    measured = _read("token_seconds")["seconds"]
    rows = [["*the backbone alone*", "", "", f"{measured['backbone']:.2f}"]]
    for title, group in _read("probes").items():
        if not title.startswith(" ".join(titles)):
            continue
        train, test = group["images"]
        what = "RMSE / relative error" if group["task"] == "depth" else "mIoU / boundary F"
        rows.append([f"*{title} ({train} + {test} images): {what}*", "", "", ""])
        found = group["protocols"]
        for name in (one for one in measured if one in found["own"]):
            shown = [_scores(found[part][name]) for part in ("own", "transfer")]
            rows.append([TOKEN_ROWS.get(name, name), *shown, f"{measured[name]:.2f}"])
    return _rows(["", "own", "transfer", "seconds"], rows)


def _scores(scores: dict[str, list[float]]) -> str:
    """Scores of one row: mIoU and boundary F, or RMSE and relative error."""
    if "rmse" in scores:
        pairs = (scores[name] for name in ("rmse", "abs_rel"))
        return " / ".join(
            f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}") for mean, spread in pairs
        )
    pairs = (scores[name] for name in ("miou", "boundary_f"))
    return " / ".join(f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in pairs)


def exported() -> str:
    """Exported files of the default model beside the model itself."""
    found = _read("exported")
    base = {row["side"]: row["seconds"] for row in found["rows"] if row["form"] == "model"}
    labels = {"model": "the model itself", "model.onnx": "ONNX", "model.pt2": "exported program"}
    rows: dict[str, list[str]] = {}
    for row in found["rows"]:
        seconds = row["seconds"]
        times = f"{_milliseconds(seconds)} ({_ratio(seconds / base[row['side']])})"
        cells = [times, f"{row['megabytes']:,.0f} MB"]
        rows.setdefault(row["form"], []).extend(cells)
    for name, cells in rows.items():
        size = found["bytes"].get(name)
        cells.append("" if size is None else f"{size / 1e6:.1f} MB")
        cells.append("" if size is None else f"{found['loading'][name]:.1f} s")
    head = [text for side in base for text in (f"{side} pixels", "memory")]
    shown = [[labels[name], *cells] for name, cells in rows.items()]
    return _rows(["", *head, "file", "loading"], shown)


def extract_rates() -> str:
    """Processor time of an image: the backbone alone, and the whole of extract."""
    found = _read("extract")
    rows = []
    for name, rates in sorted(found["rates"].items()):
        if name.startswith("backbone, batch") or name in ("lazy", "features"):
            label = name if name.startswith("backbone") else f"upfeat extract --kind {name}"
            rows.append([label, _milliseconds(rates["cpu_ms_per_image"] / 1000)])
    for row in rows:
        name = row[0].removeprefix("upfeat extract --kind ")
        row.insert(1, f"{found['rates'][name]['images_per_second']:.1f}")
    rows.append(
        [
            "lazy, of the best batch's",
            f"{found['lazy_share_of_backbone_by_clock']:.0%}",
            f"{found['lazy_share_of_backbone_by_processor_time']:.0%}",
        ]
    )
    head = ["", f"images a second, {found['threads']} threads", "processor time an image"]
    return _rows(head, rows)


def extract_cost() -> str:
    """Cost of a million images from the measured rates, the arithmetic shown."""
    found, rows = _read("extract"), []
    for kind in ("lazy", "features"):
        rates, size = found["rates"][kind], found["bytes_per_image"][kind]
        spent, hours = rates["cpu_ms_per_image"], 1e6 / rates["images_per_second"] / 3600
        rows.append(
            [
                f"`{kind}`",
                f"{spent:.1f} ms × 10⁶ / 3.6·10⁶ ms = {spent / 3.6:,.1f} h",
                f"{hours:,.1f} h",
                f"{hours * found['threads'] / 64:,.2f} h",
                f"{size:,} bytes × 10⁶ = {size / 1e6:,.2f} TB",
            ]
        )
    head = ["", "processor time", f"on {found['threads']} cores", "on 64", "on disk"]
    return _rows(head, rows)


def raster_rates() -> str:
    """Time and memory of rasters by their area."""
    rows = [
        [
            f"{row['side']:,} × {row['side']:,}",
            f"{row['processor_seconds']:,.0f} s",
            f"{row['work_seconds_a_megapixel']:.2f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['output_bytes'] / 1e6:.1f} MB",
        ]
        for row in _read("rasters")["rasters"]
    ]
    return _rows(["pixels", "processor time", "a megapixel", "largest memory", "result"], rows)


def raster_cost() -> str:
    """Cost of 10⁹ pixels from the measured rate, the arithmetic shown."""
    largest = max(_read("rasters")["rasters"], key=lambda row: row["side"])
    rate, size = largest["work_seconds_a_megapixel"], largest["output_bytes"]
    hours, pixels = rate * 1000 / 3600, largest["megapixels"]
    row = [
        f"1,000 × {rate:.2f} s = {hours:.2f} h",
        f"{60 * hours / 40:.1f} min",
        f"1,000 × {size / 1e6:.1f} MB / {pixels:,.0f} = {size / 1e6 / pixels * 1000:,.0f} MB",
        "10⁹ × 224 bytes = 224 GB",
    ]
    return _rows(["one core", "40 cores", "classes", "features, before compression"], [row])


def seams() -> str:
    """Scores of seams, tiled and whole."""
    rows = [
        [
            f"`{row['backbone']}`" + ("" if row["halo"] is None else ", exact tiles"),
            f"{row['whole']:.2f}",
            f"{row['raster']:.2f}",
            f"{row['noise']:.2f}",
            f"{row['whole_at_plain']:.2f}",
            f"{row['plain']:.2f}",
            f"{row['relative_difference']:.2g}",
        ]
        for row in _read("seams")["rows"]
    ]
    head = ["backbone", "whole image", "`upfeat raster`", "noise"]
    head += ["whole, at plain tiles", "plain tiles", "raster less whole, relative"]
    return _rows(head, rows)


def memory_bound() -> str:
    """Largest memory with and without a bound."""
    found = _read("memory")
    names = {
        "map": "`lazy.full(out=…)`, 64² cells to 1024² pixels, 384 channels, float32",
        "run": "`upfeat run`, 4096 × 4096 pixels",
    }
    rows = [
        [
            names[one["job"]],
            f"{one['unbounded']['peak_bytes'] / 1e9:.2f} GB",
            f"{one['bounded']['peak_bytes'] / 1e9:.2f} GB",
            "the same bits" if one["same_bits"] else "other bits",
        ]
        for one in found["results"]
    ]
    return _rows(["", "unbounded", f"bound of {found['max_memory']}", "result"], rows)


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.1f} ms" if value < 20 else f"{value:,.0f} ms"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.3g}"


def generated(text: str) -> str:
    """A page with its tables and figures written anew."""

    def write(match: re.Match[str]) -> str:
        begin, name, arguments, end = match.groups()
        return f"{begin}{globals()[name](*arguments.split())}\n{end}"

    return figures.filled(_BLOCK.sub(write, text))


def main(arguments: list[str]) -> int:
    """Write or check all pages; 1 where one has drifted."""
    drifted = []
    for page in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = page.read_text()
        new = generated(text)
        if new != text:
            drifted.append(page)
            if "--check" not in arguments:
                page.write_text(new)
    for name, draw in PICTURES.items():
        path, new = DOCS / "images" / name, draw()
        if not path.is_file() or path.read_text(encoding="utf-8") != new:
            drifted.append(path)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    for page in drifted:
        print(page.relative_to(DOCS.parent))
    return int("--check" in arguments and bool(drifted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
