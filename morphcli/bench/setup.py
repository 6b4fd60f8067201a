"""How a comparison was measured, in words."""

from morphserve.morphcli.bench.record import Settings, Simulated, Summary
from morphserve.morphcli.bench.summary import show_s, show_slo
from morphserve.morphcli.bench.table import policy_title
from morphserve.morphcli.traces.readers import Reading
from morphserve.morphcli.traces.schedule import Shape


def how_measured(summary: Summary) -> list[tuple[str, str]]:
    """Names and sentences: what was sent, to whom, on what."""
    settings, machine = summary.settings, summary.environment
    lags = ", ".join(f"{policy_title(p.policy)} {show_s(p.lag_p99_s)}" for p in summary.policies)
    return [
        ("trace", _trace(summary)),
        ("prompts", _prompts(settings)),
        ("target", show_slo(settings.slo) or "none"),
        ("servers", _servers(summary)),
        ("load", _load(settings, lags)),
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.platform}"),
        ("software", f"morphserve {machine.morphserve} ({machine.commit or 'no commit'}), "
         f"Python {machine.python}, torch {machine.torch}"),
        ("figures", "summary.json holds every figure of this page, requests.jsonl every request, "
         "timeline.jsonl every sample of a server's state, plots/ every drawing as SVG and PNG."),
    ]  # fmt: skip


def _load(settings: Settings, lags: str) -> str:
    if settings.simulated is not None:
        return "Open loop: each request comes at its own time, answered or not."
    return (
        "Open loop: each request leaves at its own time from a separate process, answered "
        f"or not. How late they left (P99): {lags}; over 50 ms a run proves nothing."
    )


def _simulated(settings: Settings, simulated: Simulated) -> str:
    router = f" behind a {simulated.router} router" if simulated.replicas > 1 else ""
    memory = settings.memory_budget or "all its memory"
    return (
        f"simulated: {simulated.replicas} × {simulated.device}{router}, each with {memory} for "
        "weights and KV cache. Scheduler, block pool, monitor and controller are those that serve; "
        f"steps take the times of a cost model, × {simulated.slowdown:g}. "
        + " ".join(f"{name}: {value}." for name, value in simulated.constants.items())
    )


def _prompts(settings: Settings) -> str:
    if settings.simulated is not None:
        return "none: a simulated request has lengths and no content"
    if settings.references is not None:
        return f"rows of {settings.references}, whose right answers are known"
    return f"cut from {settings.prompts or 'the held-out text of the model'}"


def _trace(summary: Summary) -> str:
    settings, facts = summary.settings, summary.trace
    shape, trace = settings.shape, settings.trace
    if shape.window_rows is not None:
        trace += ", rows {} to before {}".format(*shape.window_rows)
    elif shape.window_s is not None:
        trace += ", seconds {:g} to {:g}".format(*shape.window_s)
    trace += _reading(settings.reading)
    trace += f"; rate × {shape.rate_scale:g}, time × {shape.time_scale:g}"
    trace += f", prompts × {shape.length_scale:g}"
    trace += f", outputs × {shape.length_scale * shape.output_scale:g}"
    trace += f", seed {shape.seed}. {facts.prompt_tokens:,} prompt and "
    trace += f"{facts.output_tokens:,} output tokens; {facts.clipped_prompts} prompts and "
    trace += f"{facts.clipped_outputs} outputs cut to the longest allowed{_longest(shape)}. "
    return trace + facts.skipped_rows


def _reading(reading: Reading) -> str:
    """How the file was read, where it was said."""
    told = ""
    if reading.columns is not None:
        columns = reading.columns
        told += f", columns time={columns.time}, prompt={columns.prompt}, output={columns.output}"
    if reading.time_unit is not None:
        told += f", stamps in {reading.time_unit.value}"
    return told


def _longest(shape: Shape) -> str:
    named = (("prompts", shape.max_prompt), ("outputs", shape.max_output))
    told = ", ".join(f"{name} {most:,} tokens" for name, most in named if most is not None)
    return f" ({told})" if told else ""


def _servers(summary: Summary) -> str:
    settings = summary.settings
    if settings.simulated is not None:
        return _simulated(settings, settings.simulated)
    served_by = f"; computing with {', '.join(summary.served_by)}" if summary.served_by else ""
    if settings.url is not None:
        return f"already running at {settings.url}{served_by}"
    order = [run.policy for run in summary.runs] or list(settings.policies)
    return (
        f"a fresh one per run, in the order {', '.join(order)}, each with "
        f"{settings.memory_budget or 'the default amount'} of memory for weights and KV cache; "
        f"bundle {settings.bundle or 'none'}; answers given up after {settings.timeout_s:g} s"
        f"{served_by}"
    )
