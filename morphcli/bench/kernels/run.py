"""Everything measured, phase after phase."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from morphserve.morphcli.bench.kernels.attention import attention_tasks
from morphserve.morphcli.bench.kernels.linears import SHAPES, linear_tasks, make_weights
from morphserve.morphcli.bench.kernels.machine import multiply_rates, read_rates
from morphserve.morphcli.bench.kernels.models import Shape, memory_need
from morphserve.morphcli.bench.kernels.race import Task, race
from morphserve.morphcli.bench.kernels.result import KernelBench, Machine
from morphserve.morphcli.bench.kernels.rows import row_tasks, sampler_tasks
from morphserve.morphcli.bench.kernels.steps import CONTEXT, MODELS, SEQUENCES, StepTimer
from morphserve.quantize.cores import own_cores
from morphserve.quantize.machine import device_name, free_memory
from morphserve.runtime.kernels import Kernels, load_kernels
from morphserve.runtime.measure import num_threads

Show = Callable[[str], None]  # told what goes on


def bench_kernels(threads: int | None, show: Show) -> KernelBench:
    """Machine, kernels and steps with so many threads.

    None: OMP_NUM_THREADS, else one per core it gets.
    """
    count = threads or torch.get_num_threads()
    with num_threads(count), torch.inference_mode():
        show("this machine: memory and registers")
        machine = _measure_machine(count)
        kernels = load_kernels("cpu")
        bench = KernelBench(machine, [], [], [], [])
        for tasks in _tasks(kernels, show):
            bench.kernels.extend(race(tasks, machine))
        bench.notes.extend(_without_routes(bench))
        for shape in MODELS:
            _time_model(shape, kernels, bench, show)
    return replace(bench, machine=replace(machine, load_after=os.getloadavg()[0]))


def _measure_machine(threads: int) -> Machine:
    load = os.getloadavg()[0]
    return Machine(
        device=device_name(),
        cores=own_cores(),
        threads=threads,
        torch=str(torch.__version__),
        load_before=load,
        load_after=load,
        read_bytes=read_rates(threads),
        multiply_adds=multiply_rates(threads),
    )


def _tasks(kernels: Kernels, show: Show) -> Iterator[list[Task]]:
    for outputs, inputs in SHAPES:
        weights = make_weights(outputs, inputs, kernels)
        yield from _shown(linear_tasks(weights, kernels), show)
    yield from _shown(attention_tasks(kernels), show)
    yield from _shown(row_tasks(kernels), show)
    yield from _shown(sampler_tasks(kernels), show)


def _shown(batches: Iterator[list[Task]], show: Show) -> Iterator[list[Task]]:
    for tasks in batches:
        show(f"kernels: {tasks[0].kernel}, {tasks[0].size}, rows: {tasks[0].rows}")
        yield tasks


def _without_routes(bench: KernelBench) -> list[str]:
    kernels = dict.fromkeys(time.kernel for time in bench.kernels if time.torch_route is None)
    return [
        f"torch {bench.machine.torch} was left out of {kernel}: it has no such operation that "
        "runs here"
        for kernel in kernels
    ]


def _time_model(shape: Shape, kernels: Kernels, bench: KernelBench, show: Show) -> None:
    need, free = memory_need(shape, max(SEQUENCES), CONTEXT), free_memory()
    if need > free:
        bench.notes.append(
            f"{shape.name} was left out: it takes {need / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free"
        )
        return
    show(f"steps: {shape.name}, random weights")
    timer = StepTimer(shape, kernels, bench.machine)
    for sequences in SEQUENCES:
        show(f"steps: {shape.name}, sequences that decode: {sequences}")
        bench.decode.extend(timer.decode(sequences))
    show(f"steps: {shape.name}, a prompt of {CONTEXT} tokens")
    bench.prefill.extend(timer.prefill())
