"""draw.py's page, made with Gradio: its parts, what they call, and how it is served."""

import base64
import functools
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from support.colours import COLOURS
from support.devices import small
from support.errors import UserError, known_cause, reading
from support.pictures import fit_image, open_image, to_picture
from support.plot import curve

SIDE = 512  # of the canvas, in pixels
LARGEST_FILE, LARGEST_PICTURE = 20 * 2**20, 50_000_000  # that is read: bytes, pixels
WAITING = 8  # so many wait at most while one is served
KEPT = 3600  # seconds that what was sent or shown is kept on the disk, if the page runs so long
IN_STRIP = 12  # snapshots, of all
SHOWN = (("hint", "Hint"), ("sample", "With the hint"), ("alone", "Base alone"))
LESS_MEMORY = "fewer programs, or a lower --resolution"
GREY = "#808080"  # legible on light and on dark pages
CSS = """
footer {display: none !important}
#canvas canvas {width: 100%; aspect-ratio: 1; touch-action: none; cursor: crosshair; border: 1px solid gray}
.picture :is(.image-container, button, .image-frame, img) {width: 100%; height: auto; object-fit: contain}
#strip :is(.grid-wrap, .gallery-content) {height: auto; min-height: 0}
#strip:has(.empty) {display: none}
"""


def canvas() -> gr.HTML:
    """A black square to draw white lines on. Its value is the drawing, a PNG as a data URL."""
    return gr.HTML(
        html_template=f'<canvas width="{SIDE}" height="{SIDE}" role="img" aria-label="Square to draw on"></canvas>'
        '<button type="button" class="lg secondary">Clear</button>',
        js_on_load=Path(__file__).with_name("canvas.js").read_text(encoding="utf-8"), elem_id="canvas",
    )  # fmt: skip


def read_drawing(drawing: str | None) -> Image.Image:
    """What the canvas handed over. Raises UserError if nothing is drawn."""
    picture = None
    if drawing:
        with reading("the drawing", "picture", "clear it and draw again"):
            data = base64.b64decode(drawing.removeprefix("data:image/png;base64,"), validate=True)
            picture = Image.open(io.BytesIO(data), formats=["PNG"]).convert("L")
    if picture is None or picture.getbbox() is None:
        raise UserError("the drawing is empty: draw a line in the black square")
    return picture


def read_upload(path: str | None) -> Image.Image:
    """The picture that was sent. Raises UserError as open_image does."""
    if path is None:
        raise UserError("there is no picture yet: choose one")
    try:
        return open_image(Path(path), LARGEST_PICTURE)
    except UserError as error:  # where it lies here is nobody's business
        raise UserError(str(error).replace(f"{Path(path).parent}{os.sep}", "")) from None


def read_hint(painter, source: str, ring: Sequence[float], drawing: str | None, upload: str | None) -> Tensor:
    """The hint of the tab that is open. A drawing is one already: only in a picture is one looked for."""
    if source == "ring":
        return painter.ring(*ring)
    if source == "draw":
        return fit_image(read_drawing(drawing), painter.resolution)
    return painter.hint(read_upload(upload))


def picture_under(name: str, title: str) -> gr.Image:
    with gr.Column(min_width=100):
        gr.Markdown(f"**{title}**")
        return gr.Image(
            show_label=False, alt_text=title, format="png", interactive=False, buttons=[], elem_id=name,
            elem_classes="picture",
        )  # fmt: skip


def curves(history: list[dict], step: int) -> Figure:
    """Hint sensitivity, and the share of hints that are followed, over a training; a line at `step`."""
    figure = Figure(figsize=(6, 1.8), layout="constrained", facecolor="none")
    left = figure.subplots()
    right = left.twinx()
    left.semilogy(*curve(history, "hint_sensitivity"), "C0")
    right.plot(*curve(history, "followed"), "C1.-")
    right.set_ylim(-0.05, 1.05)
    left.axvline(step, color=GREY)
    left.set_xlabel("optimizer step", color=GREY)
    for axis, label, colour in ((left, "hint sensitivity", "C0"), (right, "hints followed", "C1")):
        axis.set_facecolor("none")
        axis.spines[:].set_color(GREY)
        axis.tick_params(colors=GREY)
        axis.set_ylabel(label, color=colour)
    return figure


def in_one_sentence(listener: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """The listener, its UserError shown on the page. Any other exception is a bug and goes to the console."""

    @functools.wraps(listener)
    def telling(*values):
        try:
            yield from listener(*values)
        except Exception as error:
            sentence = str(error) if isinstance(error, UserError) else known_cause(error, LESS_MEMORY)
            if sentence is None:
                raise
            raise gr.Error(sentence, duration=None, print_exception=False) from None

    return telling


def build(painter, modes: Sequence[str], history: list[dict]) -> gr.Blocks:
    """The page for a Painter and its control modes; with several snapshots also a slider, and their log."""
    preset, steps = painter.sd.preset, list(painter.paths)
    scrubs, live = len(steps) > 1, small(painter.sd.unet)  # live: fast enough to paint while a slider moves
    with gr.Blocks(title="ControlNet", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        gr.Markdown("# Draw a hint\nThe picture follows it, if the ControlNet does. Beside it: the base alone.")
        source, step = gr.State("ring"), gr.State(steps[-1])
        with gr.Row():
            with gr.Column(scale=2):
                with gr.Tabs():
                    with gr.Tab("Place a ring") as ring:
                        x = gr.Slider(0, 1, 0.5, step=0.01, label="Centre from the left, share of the side")
                        y = gr.Slider(0, 1, 0.5, step=0.01, label="Centre from the top, share of the side")
                        radius = gr.Slider(0.05, 0.6, 0.3, step=0.01, label="Radius, share of the side")
                    with gr.Tab("Draw") as draw:
                        drawing = canvas()
                    with gr.Tab("Picture") as picture:
                        upload = gr.File(label="Picture or photograph", file_types=["image"], elem_id="upload")
                with gr.Row():
                    disc = gr.Dropdown(list(COLOURS), value="coral", label="Colour of the disc")
                    background = gr.Dropdown(list(COLOURS), value="navy", label="Colour of the background")
                prompt = gr.Textbox("coral circle with navy background", label="Prompt")
                with gr.Accordion("Settings", open=False):
                    seed = gr.Number(0, precision=0, minimum=0, maximum=2**32, label="Seed")
                    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the ControlNet")
                    guidance = gr.Slider(1, 15, preset.guidance_scale, step=0.5, label="Guidance scale")
                    few = 10 if live else preset.sampling_steps  # rougher than sample.py paints, and twice as fast
                    ddim_steps = gr.Slider(1, 50, few, step=1, label="DDIM steps")
                    mode = gr.Dropdown(list(modes), value="uniform", label="Control mode (Sec. 3.4)")
                button = gr.Button("Paint", variant="primary")
            with gr.Column(scale=3):
                with gr.Row():
                    shown = [picture_under(*names) for names in SHOWN]
                if scrubs:
                    plot = gr.Plot(curves(history, steps[-1]), show_label=False)
                    apart = min(after - before for before, after in zip(steps, steps[1:]))
                    label = "Snapshot of the training, after so many steps"
                    step = gr.Slider(steps[0], steps[-1], steps[-1], step=apart, label=label, elem_id="step")
                    all_steps = gr.Button("All steps at once")
                    strip = gr.Gallery(
                        show_label=False, columns=6, height="auto", format="png", interactive=False, elem_id="strip"
                    )

        hints = [source, x, y, radius, drawing, upload]
        settings = [prompt, seed, strength, guidance, ddim_steps, mode]

        def read(source, x, y, radius, drawing, upload, prompt, seed, strength, guidance, ddim_steps, mode):
            hint = read_hint(painter, source, (x, y, radius), drawing, upload)
            alone = {"prompt": prompt, "seed": seed or 0, "guidance_scale": guidance, "steps": ddim_steps}
            return hint, alone, {"strength": strength, "mode": mode} | alone

        @in_one_sentence
        def paint(step, *values):
            hint, alone, controlled = read(*values)
            yield to_picture(hint * 2 - 1), gr.skip(), gr.skip()
            for picture in painter.paint(hint, step=step, **controlled):
                yield gr.skip(), picture, gr.skip()
            yield gr.skip(), gr.skip(), painter.alone(tuple(hint.shape[1:]), **alone)

        @in_one_sentence
        def paint_all(*values):
            hint, _, controlled = read(*values)
            pictures = []
            for chosen in sorted({steps[i * (len(steps) - 1) // (IN_STRIP - 1)] for i in range(IN_STRIP)}):
                pictures.append((painter.sample(hint, step=chosen, **controlled), f"step {chosen}"))
                yield pictures

        def write_prompt(disc, background):
            return f"{disc} circle with {background} background"

        one_at_a_time = {"concurrency_id": "painter", "concurrency_limit": 1, "show_progress": "hidden"}
        triggers = [button.click]
        if live:
            changing = [x, y, radius, *settings, *([step] if scrubs else [])]
            triggers += [page.load, drawing.input, upload.upload, *(part.change for part in changing)]
        # While one picture is painted only the newest request waits: older ones are dropped.
        gr.on(triggers, paint, [step, *hints, *settings], shown, trigger_mode="always_last", **one_at_a_time)
        gr.on([disc.input, background.input], write_prompt, [disc, background], prompt)
        for tab, name in ((ring, "ring"), (draw, "draw"), (picture, "picture")):
            tab.select(lambda name=name: name, None, source, queue=False)
        if scrubs:
            all_steps.click(paint_all, [*hints, *settings], strip, **one_at_a_time)
            move_line = {"trigger_mode": "always_last", "show_progress": "hidden"}
            step.change(lambda step: curves(history, step), step, plot, **move_line)
    return page


def show_page(painter, modes: Sequence[str], history: list[dict], port: int) -> None:
    """Serve the page at 127.0.0.1:`port` until Ctrl-C or SIGTERM. What is sent and shown goes with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    with tempfile.TemporaryDirectory(prefix="draw-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(painter, modes, history).queue(max_size=WAITING)
        try:
            page.launch(
                server_name="127.0.0.1", server_port=port, share=False, max_file_size=LARGEST_FILE, css=CSS,
                theme=gr.themes.Default(font="system-ui", font_mono="monospace"), footer_links=[], run_history=False,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"port {port} can't be used ({error}): choose another with --port") from None
        finally:
            page.close(verbose=False)  # before the folder goes: what is still being painted would be written there
