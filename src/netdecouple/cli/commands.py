"""The commands: arguments in, one call, result out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import (
    check_model,
    check_outputs,
    check_reports,
    check_run,
    open_model,
    print_written,
    write_result,
)
from netdecouple.cli.terminal import PLAIN, Json, Output, Terminal
from netdecouple.errors import OutputError
from netdecouple.execution.scratch import check_onnx
from netdecouple.goal import parse_sweep
from netdecouple.planning.candidates import Rule
from netdecouple.planning.plan import Plan
from netdecouple.report import text
from netdecouple.report.build import chance_warning
from netdecouple.report.files import rendered, write_text
from netdecouple.report.html import inspect_html
from netdecouple.runtimes import NAMES
from netdecouple.runtimes.benchmark import SECONDS
from netdecouple.runtimes.feeds import parse_shape
from netdecouple.runtimes.onnxruntime import uses_kernels
from netdecouple.version import __version__

EXIT_CODES = """\b
Exit codes:
  0    all is well
  1    a bug in netdecouple
  2    the input or an option is wrong, or there is no room; one line says what to do, and nothing but
       whole results has been written
  3    the outputs would change by more than --within allows; nothing has been written
  4    no network is faster than the original within what the outputs may change, or it takes more time
       than --latency allows; nothing has been written
  130  interrupted by Ctrl-C; one line says what had been written by then
  141  what reads the output has stopped, and so has the command
"""

app = typer.Typer(
    help="Make pretrained convolutional networks faster without training, by network decoupling.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


@app.command()
@options.expanded
def run(
    model: options.Model,
    output: options.Outputs,
    calib: options.Calib = None,
    macs: Annotated[
        str | None,
        typer.Option(
            help="MACs that may stay: 50% or 2x (two times fewer); with --within also least, as few as can."
        ),
    ] = None,
    params: Annotated[str | None, typer.Option(help="Parameters that may stay: 50% or 2x.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Time that may stay, measured here for one input: 60% or 2x.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, help="Instead of a budget: points of top-1 accuracy that may be lost on --labels."
        ),
    ] = None,
    within: Annotated[
        str | None,
        options.option(
            "How much the outputs may change, for new inputs of the same kind: 99% (the same class), 42dB or "
            "42dB@255 (PSNR, for a peak of 255), kl=0.01 or error=0.01. Without a budget: the fastest such "
            "network; default then 99%, or 42dB if the network is no classifier."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write a network that is not --within the limit, or misses its --latency, too."
        ),
    ] = False,
    refine: Annotated[
        float | None,
        options.option(
            "Minutes to train the decoupled layers in, without labels, until the outputs are the original's "
            "again. ONNX models need PyTorch for it."
        ),
    ] = None,
    labels: options.Labels = None,
    fitting: options.Fitting = options.Fitting(),
    method: Annotated[
        str | None,
        options.option(
            "Instead of a budget, one method for every convolution but the first: nd-dp:T=4, "
            "nd:energy=0.8, cd:rank=32, sd:2x, cd+nd:40%. With --data-free exactly as published."
        ),
    ] = None,
    emit: options.BestEmit = None,
    runtime: options.Runtime = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to measure with.")] = 1,
    samples: options.Samples = api.SAMPLES,
    pictures: options.Pictures = options.Pictures(),
    opening: options.Opening = options.Opening(),
    plan_out: Annotated[Path | None, options.option("Write the plan here as JSON.")] = None,
    report: options.Reports = None,
    execution: options.Execution = options.Execution(),
    printed: Output = Output(),
) -> None:
    """Make a network faster from a few hundred unlabelled inputs, or decouple it to a budget.

    Without a budget it becomes as fast as it can on this machine with outputs as good as the same.

    \b
    Examples:
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --macs 50%
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --latency 60%
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --macs least --within kl=0.05
      netdecouple run torchvision:resnet18 -o faster/ --calib images/ --macs 2x
    """
    terminal = Terminal(printed)
    reports = check_run((model, calib, labels, opening.weights), output, plan_out, report, execution.work)
    settings = fitting.settings(None if method is None else Rule.parse(method))
    source = open_model(terminal, model, opening, fitting.seed, output)
    with execution.opened() as resources, terminal.bars() as bars:
        result = api.decouple(
            source,
            calib,
            macs=macs,
            parameters=params,
            latency=latency,
            max_drop=max_drop,
            within=within,
            force=force,
            refine=refine,
            labels=labels,
            settings=settings,
            emit=emit,
            runtime=runtime,
            threads=threads,
            preprocessing=pictures.preprocessing(source.preprocessing),
            samples=samples,
            resources=resources,
            progress=bars,
            show_budgets=lambda rows, loss: terminal.console.print(text.budget_table(rows, loss)),
        )
    runtimes = (*source.runtimes, *([runtime] if runtime else []))
    write_result(terminal, result, output, plan_out, reports, runtimes, threads)


@app.command()
@options.expanded
def sweep(
    model: options.Model,
    calib: options.Calib = None,
    macs: Annotated[str, options.option("Budgets: MACs that may stay, 80%,60%,50% or 1.5x,2x,3x.")] = "",
    compare: Annotated[
        tuple[Path, Path] | None,
        options.option("Two results of earlier runs, to compare on the same inputs."),
    ] = None,
    output: Annotated[
        Path | None,
        options.option(
            "Folder to write the networks into, one per budget; without it only figures are kept.",
            "-o",
            "--output",
        ),
    ] = None,
    csv: Annotated[Path | None, options.option("Write the curve here as CSV.")] = None,
    reports: Annotated[
        list[Path] | None, options.option("Write the curve here: .html or .json. Repeatable.", "--report")
    ] = None,
    execution: options.Execution = options.Execution(),
    labels: options.Labels = None,
    fitting: options.Fitting = options.Fitting(),
    emit: options.Emit = "standard",
    samples: options.Samples = api.SAMPLES,
    pictures: options.Pictures = options.Pictures(),
    opening: options.Opening = options.Opening(),
    printed: Output = Output(),
) -> None:
    """Decouple a network to several budgets at little more than the price of one, and find the best trade.

    \b
    Examples:
      netdecouple sweep model.onnx --calib inputs.npy --macs 80%,60%,50% --csv curve.csv
      netdecouple sweep model.onnx --calib inputs.npy --macs 1.5x,2x,3x -o networks/
      netdecouple sweep model.onnx --calib inputs.npy --compare a.onnx b.onnx
    """
    terminal = Terminal(printed)
    check_model(model)
    paths = check_reports(reports)
    inputs = (model, calib, labels, opening.weights, *(compare or ()))
    check_outputs(inputs, csv, *paths, work=execution.work)
    settings = fitting.settings()
    exported = [] if output is None else [Path("network.onnx")]
    source = open_model(terminal, model, opening, fitting.seed, exported)
    if output is not None:
        networks = api.network_paths(output, source, parse_sweep(macs, settings.rule))
        api.check_outputs([*filter(None, [csv]), *paths, *networks], api.files_of(*inputs), execution.work)
    with execution.opened() as resources, terminal.bars() as bars:
        swept = api.sweep(
            source,
            calib,
            macs,
            compare=compare or (),
            labels=labels,
            settings=settings,
            emit=emit,
            preprocessing=pictures.preprocessing(source.preprocessing),
            samples=samples,
            resources=resources,
            output=output,
            progress=bars,
        )
    texts = {} if csv is None else {csv: swept.to_csv()}
    texts |= {path: rendered(swept, path) for path in paths}
    for path, content in texts.items():
        write_text(path, content)
    terminal.console.print(text.sweep_table(swept))
    if swept.points:
        terminal.console.print(text.knee_line(swept))
    if any(compared.layers for compared in swept.compared):
        terminal.console.print(text.families_table(swept))
    for written in (*(p.file for p in swept.points if p.file), *texts):
        terminal.say("Wrote", written)
    terminal.give(json.loads(swept.to_json()) | {"outputs": [str(path) for path in texts]})


@app.command()
@options.expanded
def inspect(
    model: options.Model,
    input_size: options.InputSize = None,
    calib: Annotated[
        str | None, options.option("Some inputs, where the model does not say what they are, as for run.")
    ] = None,
    opening: options.Opening = options.Opening(),
    html: Annotated[Path | None, options.option("Write it here as a page, too.")] = None,
    printed: Output = Output(),
) -> None:
    """Show every layer's shape, MACs and principal components, and which budgets can be met.

    \b
    Examples:
      netdecouple inspect model.onnx
      netdecouple inspect model.onnx --html model.html
    """
    terminal = Terminal(printed)
    check_model(model)
    check_outputs([model, opening.weights, calib], html)
    source = open_model(terminal, model, opening)
    size = None if input_size is None else options.parse_size(input_size)
    inspection = api.inspect(source, size, calib)
    terminal.console.print(text.inspect_table(inspection))
    terminal.console.print(text.reach_table(inspection))
    if html is not None:
        write_text(html, inspect_html(inspection))
        terminal.say("Wrote", html)
    terminal.give(json.loads(inspection.to_json()))


@app.command()
@options.expanded
def apply(
    model: options.Model,
    plan: Annotated[Path, typer.Argument(help="The plan, written by run --plan-out.", show_default=False)],
    output: options.Outputs,
    calib: options.Calib = None,
    pictures: options.Pictures = options.Pictures(),
    opening: options.Opening = options.Opening(),
    report: options.Reports = None,
    memory: options.Memory = options.Memory(),
    printed: Output = Output(),
) -> None:
    """Apply a saved plan to the model and the inputs it was made for; the result is the same network.

    \b
    Example:
      netdecouple apply model.onnx plan.json -o faster.onnx --calib inputs.npy
    """
    terminal = Terminal(printed)
    reports = check_run((model, plan, calib, opening.weights), output, None, report, memory.work)
    saved = Plan.load(plan)
    source = open_model(terminal, model, opening, saved.seed, output)
    with terminal.bars() as bars:
        result = api.apply_plan(
            source,
            saved,
            calib,
            preprocessing=pictures.preprocessing(source.preprocessing),
            resources=memory.resources(),
            progress=bars,
        )
    write_result(terminal, result, output, None, reports)


@app.command()
@options.expanded
def lower(model: options.OnnxModel, output: options.Output, printed: Output = Output()) -> None:
    """Write a network's fused operators as standard ones, which every runtime has.

    \b
    Example:
      netdecouple lower fused.onnx -o standard.onnx
    """
    terminal = Terminal(printed)
    check_outputs([model], output)
    check_onnx(output)
    count = api.lower(model, output)
    terminal.say("Lowered", f"{count} fused operator{'s' * (count > 1)}")
    print_written(terminal, output)
    terminal.give({"model": model.name, "operators": count, "outputs": [str(output)]})


@app.command("eval")
@options.expanded
def evaluate(
    model: options.Model,
    data: Annotated[
        str,
        options.option(
            "Labelled images, FILE.npz:IMAGES,LABELS; if networks return images, FILE.npz:INPUTS,TARGETS."
        ),
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second network to compare.", show_default=False)
    ] = None,
    pictures: options.Pictures = options.Pictures(),
    opening: options.Opening = options.Opening(),
    as_json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy, or the PSNR of images, and how far two networks agree.

    \b
    Example:
      netdecouple eval model.onnx --data test.npz:images,labels --preset imagenet
    """
    terminal = Terminal(Output(as_json=as_json))
    paths = [model] if other is None else [model, other]
    for path in paths:
        check_model(path)
    openings = [opening.only_for(api.is_named(path)) for path in paths]
    sources = [api.open_model(str(p), **o.arguments()) for p, o in zip(paths, openings, strict=True)]
    with terminal.bars() as bars:
        scores = api.evaluate(sources, data, pictures.preprocessing(sources[0].preprocessing), bars)
    terminal.console.print(text.scores_table(scores))
    first = scores[0]
    warnings = () if first.top1 is None else chance_warning(first.top1, first.majority or 0.0)
    for warning in warnings:
        terminal.say("Warning", warning)
    terminal.give({"scores": [asdict(score) for score in scores], "warnings": warnings})


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="The networks to time; the first is compared with.", show_default=False),
    ],
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help=f"{', '.join(NAMES)}; default {NAMES[0]}. Repeatable.",
            autocompletion=options.among(NAMES),
        ),
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads to run with; default 1. Repeatable.")
    ] = None,
    shape: Annotated[
        str | None, options.option("Shape of the input, where the networks leave it open: 1x3x224x224.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=86400, help="Time to take per runtime and number of threads.")
    ] = SECONDS,
    layers: Annotated[bool, typer.Option("--layers", help="Show ONNX Runtime's time per layer too.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open .pt2 files, which can run any code of their author.")
    ] = False,
    constant: options.Constants = None,
    custom_ops: options.CustomOps = None,
    report: Annotated[Path | None, options.option("Write the times here as JSON.", "--report")] = None,
    as_json: Json = False,
) -> None:
    """Time networks against each other, in turns; a speedup is shown only if it is beyond the noise.

    \b
    Examples:
      netdecouple bench model.onnx faster.onnx --threads 1 --threads 2
      netdecouple bench model.onnx faster.onnx --runtime openvino --report times.json
    """
    terminal = Terminal(Output(as_json=as_json))
    check_outputs(models, report)
    with terminal.bars() as bars:
        times = api.bench(
            models,
            tuple(dict.fromkeys(runtimes or NAMES[:1])),
            threads=tuple(dict.fromkeys(threads or [1])),
            shape=None if shape is None else parse_shape(shape),
            seconds=seconds,
            layers=layers,
            trust=trust,
            constants=options.parse_constants(constant),
            custom_ops=custom_ops or (),
            progress=bars,
        )
    if report is not None:
        write_text(report, times.to_json())
    for table in (*text.timing_tables(times), *map(text.layer_times_table, times.layers)):
        terminal.console.print(table)
    terminal.give(json.loads(times.to_json()))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")] = Path(
        "netdecouple-demo"
    ),
    macs: Annotated[
        str | None, typer.Option(help="MACs that may stay; without: the fastest network.")
    ] = None,
) -> None:
    """Make a small digit classifier faster, and show time, MACs and accuracy before and after."""
    terminal = Terminal(Output())
    console = terminal.console
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot make the folder ({error.strerror}); choose another -o"
        ) from error
    model, data = (Path(__file__).parents[1] / "demo" / name for name in ("digits.onnx", "digits.npz"))
    console.print("A small VGG-like network that reads digits among clutter, and 512 unlabelled images.")
    with terminal.bars() as bars:
        result = api.decouple(
            model,
            f"{data}:calib",
            macs=macs,
            progress=bars,
            show_budgets=lambda rows, loss: console.print(text.budget_table(rows, loss)),
        )
    faster = output / "digits-decoupled.onnx"
    result.save(faster)
    scores = api.evaluate([model, faster], f"{data}:images,labels")
    networks = [model, faster]
    if uses_kernels(result.model):
        networks.append(output / "digits-standard.onnx")
        api.lower(faster, networks[-1])
    times = api.bench(networks, layers=True)
    top1 = (scores[0].top1 or 0.0, scores[1].top1 or 0.0)
    report = replace(result.report, accuracy=top1, benchmark=times)
    page = output / "report.html"
    result = replace(result, report=report)
    write_result(terminal, result, [faster], output / "plan.json", [output / "report.json", page])
    console.print(text.scores_table(scores))
    for table in text.timing_tables(times):
        console.print(table)
    console.print(f"Results are in {output}/; what was gained and lost, layer by layer: {page}", **PLAIN)
