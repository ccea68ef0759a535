"""`tp-attention`: the command line.

Each command parses, then runs one function on every rank: the launcher's ranks when a launcher started us, our own
otherwise. Bad input ends in one line on standard error and exit code 1.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Option(help="A bundled model (smollm2, minilm) or a local Hugging Face folder.")]
TP = Annotated[int | None, typer.Option(help="Ranks. Default: the launcher's ranks, or 1 without a launcher.")]
DType = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: the checkpoint's.")]
Layout = Annotated[
    str | None, typer.Option(help="How the files pack q, k and v, where they do not say: a name, or a layout's .json.")
]
Heads = Annotated[int | None, typer.Option(help="Query heads, where no file says.")]
KVHeads = Annotated[int | None, typer.Option(help="Key-value heads, where no file says.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Unpickle files that need it: runs code in them.")]
Check = Annotated[bool, typer.Option("--check", help="Compare with the unsharded Hugging Face model.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing but the result: no bars, no tables.")]


@app.callback()
def configure(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say which paths run, and why no faster one.")
    ] = False,
) -> None:
    """Tensor-parallel attention: run, inspect, measure."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("tp_attention").setLevel(logging.INFO)


@app.command()
def generate(
    model: Model = "smollm2",
    tp: TP = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue. Default: standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DType = None,
    check: Check = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt with a causal language model, its attention and MLP sharded over ranks."""
    from tp_attention.launch import environment
    from tp_attention.models import jobs
    from tp_attention.models.generation import Sampling

    sampling = Sampling(temperature, top_p, seed)
    text = prompt or ""
    if prompt is None and environment.read().rank == 0:  # a launcher's ranks share one standard input
        if sys.stdin.isatty():
            print("the prompt is read from here; Ctrl-D ends it", file=sys.stderr)
        text = sys.stdin.read().removesuffix("\n")
    if not text and environment.read().rank == 0:
        raise ValueError("the prompt is empty; pass --prompt or text on standard input")
    job = jobs.Job(model, _folder(model, tp, "generate"), tp, _dtype(dtype), check, quiet)
    _on_ranks(tp, jobs.generate, job, text, max_new_tokens, sampling)


@app.command()
def embed(
    texts: Annotated[list[str], typer.Argument(help="Texts to compare.")],
    model: Model = "minilm",
    tp: TP = None,
    dtype: DType = None,
    check: Check = False,
    quiet: Quiet = False,
) -> None:
    """Print how similar texts are, by a sentence encoder with its attention and MLP sharded over ranks."""
    from tp_attention.models import jobs

    _on_ranks(
        tp, jobs.embed_texts, jobs.Job(model, _folder(model, tp, "embed"), tp, _dtype(dtype), check, quiet), texts
    )


@app.command()
def reshard(
    source: Annotated[str, typer.Argument(metavar="IN", help="A checkpoint of any format, or a bundled model.")],
    destination: Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")],
    tp: Annotated[int, typer.Option(help="Ranks to cut for.")],
    format: Annotated[str, typer.Option(help="native, hf, megatron or deepspeed.")] = "native",
    layout: Layout = None,
    target_layout: Annotated[str | None, typer.Option(help="How OUT packs them. Default: as IN does.")] = None,
    heads: Heads = None,
    kv_heads: KVHeads = None,
    max_memory: Annotated[str | None, typer.Option(help="For the workers' buffers, like 2GB.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads. Default: one a core, at most 4.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Bytes, memory and legal tp; write nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash IN and OUT, and recover IN from OUT.")] = False,
    verify_forward: Annotated[bool, typer.Option("--verify-forward", help="Run layers at both cuts.")] = False,
    allow_pickle: AllowPickle = False,
    quantize: Annotated[bool, typer.Option("--quantize", help="Attention and MLP weights to int8.")] = False,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    requantize: Annotated[bool, typer.Option("--requantize", help="Make new groups of int8 weights.")] = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint cut for some number of ranks into one for another. A killed run goes on when run again."""
    from tp_attention.checkpoint import command

    command.run_reshard(
        _checkpoint(source),
        destination,
        tp,
        quiet,
        max_memory,
        format=format,
        layout=layout,
        target_layout=target_layout,
        heads=heads,
        kv_heads=kv_heads,
        workers=workers,
        dry_run=dry_run,
        verify=verify,
        verify_forward=verify_forward,
        allow_pickle=allow_pickle,
        quantize=quantize,
        group_size=group_size,
        requantize=requantize,
    )


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint of any format, or a bundled model.")],
    tp: Annotated[int | None, typer.Option(help="Say who would own what on so many ranks.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    layout: Layout = None,
    heads: Heads = None,
    kv_heads: KVHeads = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Say what a checkpoint is: format, layout, cut, sizes, legal tp, and who owns what."""
    from tp_attention.checkpoint import command

    if _speaks():
        command.run_inspect(
            _checkpoint(path), tp, tensors, layout=layout, heads=heads, kv_heads=kv_heads, allow_pickle=allow_pickle
        )


@app.command()
def doctor() -> None:
    """Show what is installed here and what will therefore be used."""
    from tp_attention.doctor import show

    if _speaks():
        show()


@app.command()
def bench(
    benchmarks: Annotated[
        list[str] | None,
        typer.Argument(
            help="attention, decode, projections, materialised, generation. Default: all on a GPU, else generation.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Rows whose names contain this; repeatable.")] = None,
    peers: Annotated[list[str] | None, typer.Option(help="Peers to run beside us; repeatable. Default: all.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the CSV files and plots. Default: benchmarks, tiny ones to benchmarks-tiny."),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw kernel benchmarks as PNG files too (needs matplotlib).")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes: a dry run, of use without a GPU.")] = False,
) -> None:
    """Measure, beside the peers, in one run; every row is appended to a CSV file as it is done."""
    from tp_attention.bench import command
    from tp_attention.bench.results import folder

    command.bench(benchmarks or [], rows, peers, folder(out, tiny), plot, tiny)


def _speaks() -> bool:
    """Whether to say what all ranks of a launcher would say alike."""
    from tp_attention.launch import environment

    try:
        return environment.read().rank == 0
    except ValueError:  # a launcher that left something out
        return True


def _on_ranks(tp: int | None, job: Callable[..., Any], *args: Any) -> None:
    """Run `job` on every rank: in this process under a launcher or alone, on spawned ranks otherwise."""
    from tp_attention import launch

    if launch.launched() or tp in (None, 1):
        job(*args)
    else:
        # Forked even with several threads each, which is safe from here: this process has started no thread pool.
        launch.spawn(job, tp, *args, threads=max(1, (os.cpu_count() or 1) // tp), start_method="fork")


def _folder(model: str, tp: int | None, command: str) -> Path:
    """The model's folder, refused early where it cannot work.

    A conversion runs in a process of its own: ranks fork from this one, which must stay idle.
    """
    from tp_attention import launch
    from tp_attention.models import jobs

    if tp is not None and tp < 1:
        raise ValueError(f"--tp {tp} must be at least 1")
    if launch.launched():
        return jobs.prepare(model, tp, command)
    return launch.spawn(jobs.prepare, 1, model, tp, command)[0]


def _checkpoint(path: str) -> str | Path:
    """The path, or the folder of the bundled model of that name."""
    if Path(path).exists() or len(Path(path).parts) > 1:
        return path
    from tp_attention.models import folders

    return folders.resolve(path) if path in folders.BUNDLED else path


def _dtype(name: str | None) -> Any:
    import torch

    known = ("float32", "float16", "bfloat16")
    if name is not None and name not in known:
        raise ValueError(f"--dtype {name} is not known; use one of {', '.join(known)}")
    return None if name is None else getattr(torch, name)


def main() -> None:
    """Entry point: `app`, with every error as one line; --verbose keeps the traceback."""
    _take_local_rank()
    try:
        app()
    except Exception as error:  # the outermost boundary: nothing is swallowed, only shortened
        if logging.getLogger("tp_attention").isEnabledFor(logging.INFO):
            raise
        sys.exit(_one_line(error))


def _take_local_rank() -> None:
    """Takes off the local rank that deepspeed and older launchers put before the arguments that are ours."""
    if found := re.match(r"--local[-_]rank[= ](\d+)( |$)", " ".join(sys.argv[1:3])):
        del sys.argv[1 : 2 if "=" in sys.argv[1] else 3]
        os.environ.setdefault("LOCAL_RANK", found[1])


def _one_line(error: Exception) -> str | int:
    """What to say of an error that ends the program; no word of a closed pipe, which is how `| head` ends."""
    from tp_attention.launch import RankError

    kind, text = type(error).__name__, str(error)
    if isinstance(error, RankError):
        kind, text = error.cause_type, error.cause_message
        if not error.traceback:  # killed: there is no message of its own
            return f"error: rank {error.rank}: {text}; the other ranks were ended"
    if kind == "BrokenPipeError":
        return 1
    text = " ".join(text.split())
    known = kind in ("ValueError", "RuntimeError") or kind.endswith("OSError")
    return f"error: {text}" if known else f"error: {kind}: {text} (tp-attention --verbose shows where)"


if __name__ == "__main__":
    main()
