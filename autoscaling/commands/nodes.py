"""`relight cluster`: write, check and price the files that make Ray provision nodes. Needs no cluster and no cloud."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaling.commands import options, output
from autoscaling.commands.failures import FAILED, WRONG, CommandError

if TYPE_CHECKING:
    from autoscaling.clusters.nodes import Choice
    from autoscaling.clusters.plan import Plan
    from deployments.fleet import Fleet


MOST_NODE_START_S = 86400.0


def _a_day_at_most(param: typer.CallbackParam, value: float | None) -> float | None:
    options.finite(param, value)
    if value is not None and value > MOST_NODE_START_S:
        raise CommandError(f"{param.opts[0]}: {value:g} is not at most {MOST_NODE_START_S:g}, a day", WRONG)
    return value


cluster_app = typer.Typer(
    help="Clusters whose GPU nodes come and go: their files, what fits, what they cost.", no_args_is_help=True
)

ProviderOption = Annotated[
    str, typer.Option(help="aws, gcp, azure, kuberay, local or fake.", show_default=False)
]
FleetOption = Annotated[Path, typer.Option("--fleet", help="The fleet file.")]
OptionalFleet = Annotated[
    Path | None,
    typer.Option("--fleet", help="The fleet that must fit (default: the one in the Serve config)."),
]
Gpu = Annotated[
    str | None,
    typer.Option(help="Types of GPU, like L4,A100: no others, and these also where no model names them."),
]
Prices = Annotated[
    Path | None, typer.Option(help="A YAML file of prices and machines, laid over Relight's own catalogue.")
]
NodeStart = Annotated[
    float,
    typer.Option(
        help="Seconds that a GPU node was measured to take to start, its image included.",
        min=1,
        callback=_a_day_at_most,
    ),
]
Region = Annotated[str | None, typer.Option(help="The region (default: that of the prices).")]

NODE_START_S = 300.0

_PART = r"[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*"
_HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
_RIGHT = {
    "--name": (
        r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?",
        "1 to 40 of a-z, 0-9 and -, beginning with a letter and not ending with -",
    ),
    "--region": (r"[a-z0-9]+(-[a-z0-9]+)*", "a region, like us-east-1, us-central1 or eastus"),
    "--image": (
        rf"([A-Za-z0-9.-]+(:[0-9]+)?/)?{_PART}(/{_PART})*",
        "a repository of images without a tag, like ghcr.io/me/relight",
    ),
    "--project": (
        r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]",
        "the id of a project: 6 to 30 of a-z, 0-9 and -, beginning with a letter and not ending with -",
    ),
    "--security-group": (r"sg-[0-9a-f]{8,17}", "the id of a security group, like sg-0123456789abcdef0"),
    "--redis": (rf"{_HOST}:[0-9]{{1,5}}", "HOST:PORT"),
    "--gcs": (rf"{_HOST}:[0-9]{{1,5}}", "HOST:PORT"),
}
"""What can be said with an option of `render`: a pattern, and the same for people."""
_OF = {
    "--region": ("aws", "gcp", "azure"),
    "--image": ("aws", "gcp", "azure", "kuberay"),
    "--project": ("gcp",),
    "--security-group": ("aws",),
    "--redis": ("kuberay",),
    "--gcs": ("fake",),
    "--node-start": ("aws", "gcp", "azure", "kuberay", "fake"),
}
"""The providers whose files hold it. What is not here is for all."""


def register(app: typer.Typer) -> None:
    app.add_typer(cluster_app, name="cluster")


@cluster_app.command("render")
def render(
    *,
    provider: ProviderOption,
    fleet: FleetOption = Path("fleet.yaml"),
    gpu: Gpu = None,
    region: Region = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write to; without it the files are printed.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over files that are there and differ.")
    ] = False,
    name: Annotated[str, typer.Option(help="The cluster's name.")] = "relight",
    image: Annotated[
        str | None, typer.Option(help="The repository of your images, whose tags are cpu and cuda.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="Google's project.")] = None,
    security_group: Annotated[
        str | None, typer.Option(help="AWS: the id of a closed security group.")
    ] = None,
    redis: Annotated[
        str, typer.Option(help="Kubernetes: HOST:PORT of the Redis that keeps Ray's state.")
    ] = "redis:6379",
    gcs: Annotated[str, typer.Option(help="fake: HOST:PORT of the head.")] = "127.0.0.1:6379",
    node_start: NodeStart = NODE_START_S,
    prices: Prices = None,
) -> None:
    """Write the files of a cluster that fits a fleet, with comments that say why."""
    from autoscaling.clusters.render import Wanted
    from autoscaling.clusters.render import render as render_files

    content, choice = _choose(provider, fleet, gpu, prices, node_start)
    said: list[tuple[str, Any, Any]] = [
        ("--gpu", gpu, None),
        ("--region", region, None),
        ("--name", name, "relight"),
        ("--image", image, None),
        ("--project", project, None),
        ("--security-group", security_group, None),
        ("--redis", redis, "redis:6379"),
        ("--gcs", gcs, "127.0.0.1:6379"),
        ("--node-start", f"{node_start:g}", f"{NODE_START_S:g}"),
        ("--prices", prices, None),
    ]
    command = ["relight", "cluster", "render", "--provider", provider, "--fleet", str(fleet)]
    for option, value, default in said:
        if value != default:
            _check(option, str(value), provider)
            command += [option, str(value)]
    given = {k: v for k, v in {"image": image, "project": project}.items() if v is not None}
    wanted = Wanted(
        command=shlex.join(command),
        fleet_file=str(fleet),
        name=name,
        region=region,
        security_group=security_group,
        redis=redis,
        gcs=gcs,
        node_start_s=node_start,
        **given,
    )
    files = render_files(content, choice, wanted)
    if out is None:
        for index, (file, text) in enumerate(files.items()):
            typer.echo(f"{'' if index == 0 else '---'}\n# {file}\n{text}".lstrip("\n"), nl=False)
        return
    _write(out, files, force=force)


@cluster_app.command("validate")
def validate(
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files for `ray up`, KubeRay or Serve.")
    ],
    fleet: OptionalFleet = None,
    node_start: NodeStart = NODE_START_S,
    prices: Prices = None,
    as_json: options.Json = False,
) -> None:
    """Check cluster files: against the schemas of those who read them, and against the fleet.

    Ray's own schema and checks, KubeRay's CRDs, Serve's schema with unknown keys as errors, EC2's and Azure's
    parameters; then whether every model fits on some node, spot nodes have a fallback, times agree, nothing is open.
    """
    from autoscaling.clusters.validate import local_files, validate_text
    from deployments.fleet import load_fleet

    content = load_fleet(fleet) if fleet is not None else None
    over = _prices(prices)
    answer: list[dict[str, Any]] = []
    for file in files:
        text = _read(file)
        beside = {
            p: _read(file.parent / p) for p in local_files(text, str(file)) if (file.parent / p).is_file()
        }
        kinds, problems = validate_text(
            text, str(file), fleet=content, beside=beside, prices=over, node_start_s=node_start
        )
        errors = [p.line(str(file)) for p in problems if not p.note]
        notes = [p.line(str(file)) for p in problems if p.note]
        answer.append(
            {"file": str(file), "kinds": kinds, "right": not errors, "errors": errors, "notes": notes}
        )
    if as_json:
        options.print_json(answer)
    wrong = [line for entry in answer for line in entry["errors"]]
    if not as_json:
        for entry in answer:
            for line in entry["notes"]:
                output.say(f"note: {line}", style="dim")
            if entry["right"]:
                output.say(f"{entry['file']}: right ({', '.join(map(str, entry['kinds']))})")
    if wrong:
        if as_json:
            raise typer.Exit(WRONG)
        raise CommandError("\n".join(map(str, wrong)), WRONG)


@cluster_app.command("plan")
def show_plan(
    *,
    provider: ProviderOption,
    fleet: FleetOption = Path("fleet.yaml"),
    gpu: Gpu = None,
    prices: Prices = None,
    as_json: options.Json = False,
) -> None:
    """Show what nodes each model would get, and what they cost an hour, dark and lit."""
    from autoscaling.clusters.plan import plan

    content, choice = _choose(provider, fleet, gpu, prices, NODE_START_S)
    result = plan(content, choice)
    if as_json:
        options.print_json(result.to_json())
        return
    if not choice.types:
        output.say(f"Nodes of {provider} neither come nor go: models run on the machine that is there.")
        return
    _print_plan(result)


def _print_plan(result: Plan) -> None:
    machines = result.choice.machines
    rows = []
    for m in result.models:
        for index, node in enumerate(m.choices):
            rows.append(
                (
                    m.model if index == 0 else "",
                    node.name,
                    node.shape.name,
                    _usd(node.usd_per_hour),
                    str(m.max_nodes) if index == 0 else "",
                    _usd(m.all_usd_per_hour) if index == 0 else "",
                )
            )
    output.table(
        ("model", "nodes, in order", "machine", "$/h", "at most", "$/h"),
        rows,
        numbers=("$/h", "at most"),
    )
    head = result.choice.head.name if result.choice.head else "-"
    output.say(f"\ndark: {_usd(result.dark_usd_per_hour)} $/h (the head, {head}, and what is never dark)")
    lit = "lit, one replica of each model, or what of it is never dark, on nodes of its own"
    output.say(f"{lit}: {_usd(result.lit_usd_per_hour)} $/h")
    output.say(f"lit, all replicas: {_usd(result.most_usd_per_hour)} $/h")
    if machines.source:
        spot = f"; spot taken as {machines.spot_share:.0%} of it" if machines.spot_share else ""
        output.say(
            f"List prices, {machines.region}{spot}. {machines.source}: {machines.checked}.", style="dim"
        )
    elif result.head_usd_per_hour is None:
        output.say("Nobody said what these nodes cost: give --prices FILE.", style="dim")


def _choose(
    provider: str, fleet: Path, gpu: str | None, prices: Path | None, node_start_s: float
) -> tuple[Fleet, Choice]:
    from autoscaling.clusters.catalog import PROVIDERS, load_machines
    from autoscaling.clusters.nodes import choose
    from deployments.fleet import load_fleet

    known = next((p for p in PROVIDERS if p == provider), None)
    if known is None:
        raise CommandError(f"--provider: {provider!r} is not one of {', '.join(PROVIDERS)}", WRONG)
    content = load_fleet(fleet)
    machines = load_machines(known, _prices(prices), str(prices))
    gpus = [kind.strip() for kind in gpu.split(",") if kind.strip()] if gpu else []
    return content, choose(content, known, machines, gpus, node_start_s=node_start_s)


def _prices(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from autoscaling.clusters.reading import documents

    found = documents(_read(path), str(path))[0]
    if not isinstance(found, dict):
        raise CommandError(f"{path}: is not a mapping of providers; it begins with `aws:` or another", WRONG)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file", WRONG) from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8 at byte {error.start}", WRONG) from None
    except OSError as error:
        raise CommandError(f"{path}: can't be read: {error.strerror}", WRONG) from None


def _write(out: Path, files: dict[str, str], *, force: bool) -> None:
    differing = [
        str(out / name)
        for name, text in files.items()
        if (out / name).is_file() and _read(out / name) != text
    ]
    if differing and not force:
        raise CommandError(
            f"{', '.join(differing)}: there already, and different; --force writes over it", FAILED
        )
    for name, text in files.items():
        path = out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{path}: can't be written: {error.strerror}", FAILED) from None
        output.say(f"wrote {path}")


def _check(option: str, value: str, provider: str) -> None:
    """Whether the option can be said so, and does anything for this provider."""
    pattern, right = _RIGHT.get(option, (".*", ""))
    fits = re.fullmatch(pattern, value, re.DOTALL) is not None
    if not fits or (right == "HOST:PORT" and not 0 < int(value.rpartition(":")[2]) < 65536):
        raise CommandError(f"{option}: {value!r} is not {right}", WRONG)
    if option in _OF and provider not in _OF[option]:
        of = ", ".join(_OF[option])
        raise CommandError(f"{option}: the files of {provider} hold no such thing; it is for {of}", WRONG)


def _usd(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:.2f}"
