"""report.html and the contact sheet of a demo run: pictures, curves and numbers in one file that needs no network."""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from nitscale.demo.judge import GROUP_TITLES, Judgement
from nitscale.files import atomic_write
from nitscale.pictures import Row, contact_sheet, save_png

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nitscale demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem }}
img {{ max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid #ddd }}
table {{ border-collapse: collapse }} td {{ padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: left }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums }} .note {{ color: #666; font-size: .9rem }}
</style></head><body>
<h1>nitscale demo: step {step:,}, {minutes:.1f} minutes</h1>
<p>{intro}</p>
<h2>Pictures</h2><img alt="real pictures above, samples below" src="{sheet}">
<h2>Numbers</h2>{numbers}
<h2>Training</h2><img alt="loss and speed" src="{curves}" style="image-rendering: auto">
<h2>Where the time went</h2>{times}
<h2>Machine and versions</h2>{machine}
</body></html>
"""


def write_report(folder: Path, judgement: Judgement, result: dict[str, Any]) -> None:
    """contact_sheet.png and report.html in `folder`. `result` is what report.json holds."""
    sheet = contact_sheet(sheet_rows(judgement))
    save_png(sheet, folder / "contact_sheet.png", {})
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    page = PAGE.format(
        step=judgement.step,
        minutes=result["seconds"] / 60,
        intro=escape(
            "A small NiT was trained from scratch on latents of pictures of many native sizes, packed without padding. "
            "The first row below shows real pictures; all others were sampled in mixed packs, some at sizes and aspect "
            "ratios that training never saw."
        ),
        sheet=data_url(buffer.getvalue(), "image/png"),
        numbers=numbers_table(judgement),
        curves=data_url(curves(folder / "train" / "metrics.jsonl"), "image/svg+xml"),
        times=table([(stage, f"{seconds:,.1f} s") for stage, seconds in result["seconds_by_stage"].items()]),
        machine=table([(name, str(value)) for name, value in (result["machine"] | result["versions"]).items()]),
    )
    atomic_write(folder / "report.html", page.encode())


def sheet_rows(judgement: Judgement) -> list[Row]:
    """Real pictures, then one row of samples, seed 0, for each size."""
    names, pictures = zip(*judgement.real, strict=True)
    rows = [Row("real pictures, held out", pictures, names)]
    for group, sizes in judgement.groups.items():
        for height, width in sizes:
            chosen = [
                (request, image)
                for request, image in judgement.samples
                if (request.height, request.width, request.seed) == (height, width, 0)
            ]
            captions = [judgement.classes[request.label] for request, _ in chosen]
            title = f"samples {height} x {width} pixels: {GROUP_TITLES[group]}"
            rows.append(Row(title, [image for _, image in chosen], captions))
    return rows


def numbers_table(judgement: Judgement) -> str:
    rows = []
    if judgement.classifier_on_real is not None:
        rows.append(("fixed classifier, right on real pictures", f"{judgement.classifier_on_real:.1%}"))
        rows.append(("chance", f"{1 / len(judgement.classes):.1%}"))
        for group, sizes in judgement.groups.items():
            rows.append((f"class agreement, {GROUP_TITLES[group]}", f"{judgement.agreement(group):.1%}"))
            rows += [(f"\u2003{h} x {w}", f"{judgement.agreement_by_size[h, w]:.0%}") for h, w in sizes]
        rows += [(f"agreement of {name}", f"{value:.0%}") for name, value in judgement.agreement_by_class.items()]
    rows.append(
        (f"Fréchet distance to {judgement.real_images} real latents, samples", f"{judgement.frechet_samples:.2f}")
    )
    rows.append(("the same, untrained noise", f"{judgement.frechet_noise:.2f}"))
    note = (
        '<p class="note">The classifier compares pixels with drawn layouts and knows nothing of the model. '
        "Agreement by class covers the sizes trained on and those never trained on.</p>"
    )
    return table(rows) + note


def table(rows: list[tuple[str, str]]) -> str:
    lines = (f'<tr><td>{escape(name)}</td><td class="n">{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def curves(metrics: Path) -> bytes:
    """Loss and tokens/s over steps, as SVG."""
    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure: Figure
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(steps, [line["loss"] for line in lines], color="black", label="all")
    for quartile in range(4):
        values = [line[f"loss_t{quartile}"] for line in lines]
        label = f"t {quartile / 4:.2f}-{(quartile + 1) / 4:.2f}"
        left.plot(steps, [float("nan") if v is None else v for v in values], linewidth=0.8, alpha=0.7, label=label)
    left.set(xlabel="step", title="loss (velocity, by time)", yscale="log")
    left.legend(fontsize=8)
    right.plot(steps, [line["tokens_per_s"] for line in lines], color="tab:blue")
    right.set(xlabel="step", title="tokens/s", ylim=(0, None))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
