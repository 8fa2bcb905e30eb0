"""The `nitscale` command: one sub-command a job. Heavy imports happen inside them, so that `--help` answers at once."""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nitscale import __version__
from nitscale.errors import UserError

app = typer.Typer(
    help="Train native-resolution diffusion transformers: images → latent shards → packs → model → images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the configuration: train.steps=100 model.depth=4 …")
]


def main() -> None:
    """Run a command. A UserError is printed alone, exit code 1; NITSCALE_DEBUG=1 shows its traceback."""
    try:
        app()
    except UserError as error:
        if os.environ.get("NITSCALE_DEBUG"):
            traceback.print_exc()
        fail(f"error: {error}", getattr(error, "exit_code", 1))
    except Exception:
        traceback.print_exc()
        fail("", 1)


def fail(words: str, code: int) -> NoReturn:
    """End the process at once: as a rank of a training, its peers may be waiting for it in a collective."""
    print(words, file=sys.stderr, end="\n" if words else "", flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextmanager
def resumable() -> Iterator[None]:
    """Say after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError("interrupted; what was finished is kept, and the same command goes on from there") from None


@app.callback(invoke_without_command=True)
def version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"nitscale {__version__}")
        raise typer.Exit


@app.command(epilog="Example: nitscale demo --images ~/photos --minutes 30")
def demo(
    images: Annotated[
        Path | None, typer.Option(help="Your own photos, one sub-folder a class or none; default: a built-in set.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for the whole job; more time makes better pictures.")] = 9.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default: runs/demo.")] = None,
) -> None:
    """The whole main job on this machine: draw or take images, encode, train, sample, judge, report."""
    from nitscale.demo.pipeline import DemoConfig, run_demo

    with resumable():
        run_demo(DemoConfig(out=out or Path("runs/demo"), images=images, minutes=minutes))


@app.command(epilog="Example: nitscale encode photos/ data/photos --factor 16 --channels 32")
def encode(
    source: Annotated[
        str, typer.Argument(help="Images: a folder of classes, ImageNet's tars, SA-1B, a WebDataset; local or s3://.")
    ],
    output: Annotated[str, typer.Argument(help="Dataset to make: a folder or s3://bucket/prefix.")],
    kind: Annotated[str, typer.Option(help="auto, folder, imagenet, sa1b or webdataset.")] = "auto",
    captions: Annotated[
        Path | None, typer.Option(help="JSONL or Parquet with image_id and caption, for SA-1B.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="File of class names, one a line, for WebDataset.")] = None,
    resize: Annotated[
        str, typer.Option(help="Rules, each a sample of every image: native,square-256,area-256,mixed-256.")
    ] = "native",
    codec: Annotated[
        str, typer.Option(help="dct, dc-ae-f32c32, sd-vae-ft-ema, sdxl-vae, a folder or a hub id.")
    ] = "dct",
    codec_dtype: Annotated[str, typer.Option(help="What the codec computes in: bfloat16 or float32.")] = "bfloat16",
    dtype: Annotated[str, typer.Option(help="What latents are stored as: float16 or bfloat16.")] = "float16",
    flips: Annotated[bool, typer.Option(help="Store the latents of mirror images, too.")] = True,
    jpeg: Annotated[bool, typer.Option("--jpeg", help="Store the encoded pixels, too, as JPEG.")] = False,
    text: Annotated[bool | None, typer.Option(help="Store captions; default: if the first images have any.")] = None,
    factor: Annotated[int, typer.Option(help="Pixels of one latent cell's side, for the DCT codec.")] = 16,
    channels: Annotated[int, typer.Option(help="Channels of the DCT codec's latents.")] = 32,
    patch_size: Annotated[int, typer.Option(help="Latent cells of one token's side that the model will use.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Larger images are scaled down to this many tokens.")] = 4096,
    shard_samples: Annotated[int, typer.Option(help="Samples of one shard.")] = 2048,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that decode; default: one a core.")] = None,
    codec_threads: Annotated[int, typer.Option(help="Threads of the codec on a CPU; a network gains by more.")] = 1,
    job: Annotated[
        str | None, typer.Option(help="Make only every --of-th partition from this one on, or: slurm.")
    ] = None,
    of: Annotated[int | None, typer.Option(help="Number of jobs.")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only write what all jobs share: recipe and catalog.")
    ] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Only build the manifest, after all jobs.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Make partitions anew in which images failed.")
    ] = False,
    max_failures: Annotated[float, typer.Option(help="Share of the images that may fail (20 may always).")] = 0.01,
) -> None:
    """Encode images to latent shards. Run it again to finish what was interrupted."""
    from data_prep.encode import EncodeConfig, JobOptions, default_device
    from data_prep.encode import encode as run_encode
    from data_prep.job import parse_share

    if prepare and (finish or job is not None or retry_failed):
        raise UserError("encode: --prepare goes with none of --job, --finish and --retry-failed")
    config = EncodeConfig(
        resize=tuple(rule.strip() for rule in resize.split(",")),
        factor=factor,
        channels=channels,
        patch_size=patch_size,
        max_tokens=max_tokens,
        shard_samples=shard_samples,
        dtype=dtype,
        flips=flips,
        jpeg=jpeg,
        text=text,
    )
    options = JobOptions(
        device=device or default_device(),
        workers=workers,
        codec_threads=codec_threads,
        share=parse_share(job, of),
        only="prepare" if prepare else "finish" if finish else None,
        retry_failed=retry_failed,
        max_failures=max_failures,
    )
    with resumable():
        report = run_encode(
            source,
            output,
            config,
            codec=codec,
            codec_dtype=codec_dtype,
            options=options,
            kind=kind,
            captions=captions,
            classes=classes,
        )
        print(report.summary())


@app.command(epilog="Example: torchrun --nproc-per-node 2 -m nitscale train configs/demo.yaml data.path=data/photos")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/demo.yaml.")],
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration, and stop.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="Trace steps into the run folder: 10:13 are the steps 10, 11 and 12.")
    ] = None,
) -> None:
    """Train a model, or go on with the run in its folder. Works alone and under torchrun.

    Exit codes: 0 complete, 75 stopped by a signal, 76 hung, 77 gradients not finite, 1 another error."""
    from nitscale.train.faults import ExitCode, StopSignals, Watchdog

    with StopSignals() as signals:  # before torch is imported, which takes seconds
        from nitscale.config import load_config, to_yaml
        from nitscale.train.config import RunConfig

        run = load_config(RunConfig, config, overrides or [])
        if print_config:
            print(to_yaml(run), end="")
            return
        if run.engine.tensor_parallel > 1:  # Megatron overlaps communication by the order in which kernels are launched
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        from nitscale.train.loop import run_training
        from nitscale.train.process import leave_process, start_process
        from nitscale.train.profiling import parse_profile

        steps = None if profile is None else parse_profile(profile)
        process = start_process()
        with Watchdog(run.faults, process, Path(run.run)) as watchdog, resumable():
            complete = run_training(run, process, signals, watchdog, steps)
        if process.is_main:
            what = "complete" if complete else f"stopped by {signals.name}; the same command goes on from here"
            print(f"train: {run.run} is {what}", flush=True)
        leave_process(ExitCode.COMPLETE if complete else ExitCode.STOPPED)


@app.command(epilog="Example: nitscale sample runs/demo/train --size 64x96 --size 144x96 --class 0,3 --seeds 0-7")
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    size: Annotated[list[str], typer.Option(help="HEIGHTxWIDTH in pixels; may be given several times.")],
    classes: Annotated[str, typer.Option("--class", help="Names or numbers of classes: 0,3,disc; 'all'.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds: 0-7 or 1,5,9. One image for each size, class and seed.")] = "0",
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 50,
    sampler: Annotated[str, typer.Option(help="ode (Euler) or sde (Euler-Maruyama).")] = "ode",
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 is none.")] = 2.5,
    interval: Annotated[str, typer.Option(help="Times at which guidance is on: 0 is data, 1 is noise.")] = "0,1",
    token_budget: Annotated[int, typer.Option(help="Most tokens sampled at once.")] = 4096,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
) -> None:
    """Sample images of any sizes from a checkpoint's averaged weights."""
    from nitscale.generate.job import sample_to_folder
    from nitscale.generate.sample import SamplerConfig

    config = build_sampler(
        SamplerConfig, sampler=sampler, steps=steps, guidance=guidance, interval=interval, token_budget=token_budget
    )
    sample_to_folder(checkpoint, size, classes, seeds, config, out)


@app.command(epilog="Example: nitscale evaluate samples/ --data runs/demo/heldout")
def evaluate(
    samples: Annotated[Path, typer.Argument(help="Folder of sampled images.")],
    data: Annotated[Path, typer.Option(help="Dataset of real images to compare with.")],
) -> None:
    """Fréchet distance between samples and real images, in the latents of the dataset's codec."""
    from nitscale.evaluate.job import evaluate_folder

    print(evaluate_folder(samples, data))


checkpoints = typer.Typer(help="Weights in and out: import, export, consolidate, verify.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoint")


@checkpoints.command("import", epilog="Example: nitscale checkpoint import nit_xl.safetensors --preset nit-xl")
def import_weights(
    file: Annotated[Path, typer.Argument(help="Published weights: .safetensors, .bin, .pt or .pth.")],
    preset: Annotated[str, typer.Option(help="The published model: nit-xl, fitv2-3b, …")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; default: runs/PRESET.")] = None,
) -> None:
    """Take in published weights. Missing, surplus and misshapen tensors are an error that lists them."""
    from nitscale.train.exchange import import_checkpoint

    print(import_checkpoint(file, preset, out or Path("runs") / preset))


Which = Annotated[
    str | None,
    typer.Option("--ema", help="Which average, by its name, e.g. 0.9999; 'model' for the weights themselves."),
]


@checkpoints.command("export", epilog="Example: nitscale checkpoint export runs/nit_xl nit_xl.safetensors")
def export_weights(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    file: Annotated[Path, typer.Argument(help="File to write: .safetensors, .bin, .pt or .pth.")],
    which: Which = None,
) -> None:
    """Write the averaged weights under the published code's names."""
    from nitscale.train.exchange import export_checkpoint

    print(export_checkpoint(checkpoint, file, which))


@checkpoints.command(epilog="Example: nitscale checkpoint consolidate runs/nit_xl nit_xl_step400000")
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    which: Which = None,
) -> None:
    """Put the slices of all ranks together: a folder of whole weights to sample from, a quarter of the size or less."""
    from nitscale.train.exchange import consolidate_checkpoint

    print(consolidate_checkpoint(checkpoint, out, which))


@checkpoints.command(epilog="Example: nitscale checkpoint verify runs/nit_xl")
def verify(checkpoint: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")]) -> None:
    """Check every file of a checkpoint against its manifest."""
    from nitscale.checkpoints import find_weights

    found = find_weights(checkpoint)
    found.verify()
    print(f"checkpoint: {found.folder} is whole")


data = typer.Typer(help="Datasets of latents: plan, digest, index, inspect, verify.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command(epilog="Example: nitscale data plan --sizes sizes.csv --images 1280000 --world-size 64 --json")
def plan(
    prefix: Annotated[str | None, typer.Option("--data", help="Dataset: a folder or s3://bucket/prefix.")] = None,
    sizes: Annotated[Path | None, typer.Option(help="Instead: a CSV file with columns width, height, count.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Scale the sizes to so many images.")] = None,
    factor: Annotated[int, typer.Option(min=1, help="With --sizes: pixels of a token's side.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="With --sizes: larger images are scaled down.")] = 4096,
    token_budget: Annotated[int, typer.Option(help="Most tokens of a pack.")] = 16384,
    world_size: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 8,
    packs_per_rank: Annotated[int, typer.Option(min=1, help="Packs of a rank in a step.")] = 1,
    packer: Annotated[str, typer.Option(help="balanced or lpfhp.")] = "balanced",
    lanes: Annotated[int, typer.Option(help="Independent streams of shards; 1 packs everything together.")] = 1,
    patch_size: Annotated[int, typer.Option(help="With --data: latent cells of a token's side.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="For the cache of an object store's shards.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """What an epoch will be like, before it is run: fill, packs, steps, balance and mixture."""
    from data_prep.sizes import sizes_dataset
    from nitscale.data.forecast import describe_forecast, forecast
    from nitscale.data.manifest import load_dataset
    from nitscale.data.plan import PlanConfig

    if (prefix is None) == (sizes is None):
        raise UserError("data plan: give either --data PREFIX or --sizes FILE.csv")
    dataset = sizes_dataset(sizes, images, factor, max_tokens) if sizes else load_dataset(str(prefix))
    packs_per_step = world_size * packs_per_rank
    flips = 0.5 if dataset.manifest.flips else 0.0
    config = PlanConfig(
        seed, token_budget, packs_per_step, lanes, patch_size=patch_size, packer=packer, flip_probability=flips
    )
    report = forecast(dataset, config, world_size, ranks_per_node)
    print(json.dumps(report) if as_json else describe_forecast(report))


@data.command(epilog="Example: nitscale data digest runs/demo/train/config.yaml --steps 0..1000")
def digest(
    config: Annotated[Path, typer.Argument(help="The run's YAML file, or config.yaml in its folder.")],
    overrides: Overrides = None,
    steps: Annotated[str, typer.Option(help="First and last step: 0..1000 are the steps 0 to 999.")] = "0..100",
) -> None:
    """The data digests of a run's steps, as in its metrics.jsonl, without a GPU: what data did, or will, it see?"""
    from nitscale.config import load_config
    from nitscale.data.digest import print_digests
    from nitscale.train.config import RunConfig

    run = load_config(RunConfig, config, overrides or [])
    with resumable():
        print_digests(run.data.path, run.data.plan(run.seed, run.model.patch_size), steps)


@data.command(name="index", epilog="Example: nitscale data index s3://bucket/latents --factor 32 --channels 32")
def index_data(
    prefix: Annotated[str, typer.Argument(help="Folder or s3:// prefix of WebDataset tars of latents.")],
    codec: Annotated[Path | None, typer.Option(help="JSON description of their autoencoder, a codec's spec.")] = None,
    factor: Annotated[int | None, typer.Option(help="Without --codec: pixels of a latent cell's side.")] = None,
    channels: Annotated[int | None, typer.Option(help="Without --codec: channels of the latents.")] = None,
    classes: Annotated[Path | None, typer.Option(help="File of class names, one a line.")] = None,
    label_key: Annotated[str | None, typer.Option(help="Where a sample's .json has its class.")] = None,
    latent: Annotated[str | None, typer.Option(help="Suffix of the latents' members, e.g. latent.npy.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Tars that are read at once.")] = 8,
) -> None:
    """Make index and manifest for latents that someone else wrote as WebDataset tars."""
    from nitscale.data.foreign import index_dataset, read_classes, read_codec

    spec, names = read_codec(codec, factor, channels), read_classes(classes)
    with resumable():
        print(index_dataset(prefix, spec, names, label_key, latent, workers))


@data.command(name="inspect", epilog="Example: nitscale data inspect data/photos --out data/photos-inspected")
def inspect_data(
    prefix: Annotated[str, typer.Argument(help="Dataset: a folder or s3://bucket/prefix.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("inspected"),
    patch_size: Annotated[int, typer.Option(min=1, help="Latent cells of a token's side.")] = 1,
) -> None:
    """What is in a dataset: a table, and pictures of sizes, lengths, classes and decoded images."""
    from nitscale.data.overview import inspect_dataset

    print(inspect_dataset(prefix, out, patch_size))


@data.command(name="verify", epilog="Example: nitscale data verify s3://bucket/imagenet --workers 16")
def verify_data(
    prefix: Annotated[str, typer.Argument(help="Dataset: a folder or s3://bucket/prefix.")],
    workers: Annotated[int, typer.Option(min=1, help="Shards that are checked at once.")] = 8,
) -> None:
    """Check every byte of a dataset against its manifest and indices."""
    from nitscale.data.verify import verify_dataset

    with resumable():
        print(verify_dataset(prefix, workers))


def build_sampler(kind: Any, *, interval: str, **values: Any) -> Any:
    """A SamplerConfig from command-line values; what it refuses becomes a UserError."""
    from nitscale.config import build

    try:
        low, high = (float(time) for time in interval.split(","))
    except ValueError:
        raise UserError(f"sample: --interval {interval!r} must be two times, e.g. 0,0.7") from None
    return build(kind, values | {"interval": [low, high]}, "sample", {})
