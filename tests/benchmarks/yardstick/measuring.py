"""What rounding costs, measured by transformers alone."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM

Weights = Mapping[str, Tensor]  # a decoder linear's name -> float32 [N, K]


@dataclass(frozen=True, slots=True)
class Result:
    """Relative errors of outputs, and on held-out text what the whole model loses."""

    linears: dict[str, dict[str, float]]  # by text and name
    layers: dict[str, float]  # held-out text; each rounded alone, against what the layer adds
    divergence: float | None  # KL from full precision, nats per token
    perplexity: float | None


def decoder_linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """By name; `prefix` leads from the whole model to the module."""
    return {
        prefix + name: linear
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and ".layers." in prefix + name
    }


@torch.inference_mode()
def measure_moments(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """X^T X, [K, K], of every decoder linear over the windows."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.t() @ x

        return add

    linears = decoder_linears(model).items()
    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears]
    for batch in windows.split(8):
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return sums


def relative_error(moments: Tensor, weight: Tensor, rounded: Tensor) -> float:
    def squared(x: Tensor) -> float:
        return float((x @ moments).mul_(x).sum(dtype=torch.double))

    return math.sqrt(squared(rounded - weight) / squared(weight))


def evaluate(case: Case, candidates: Mapping[str, Weights]) -> dict[str, Result]:
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32).eval()
    exact = {name: linear.weight.detach() for name, linear in decoder_linears(model).items()}
    moments = {text: measure_moments(model, windows) for text, windows in case.texts.items()}
    layers = measure_layers(model, candidates, case.held_out)
    losses = measure_losses(model, candidates, case.held_out) if case.has_text else {}
    results = {}
    for candidate, weights in candidates.items():
        linears = {
            text: {name: relative_error(of[name], exact[name], weights[name]) for name in exact}
            for text, of in moments.items()
        }
        loss = losses.get(candidate, (None, None))
        results[candidate] = Result(linears, layers[candidate], *loss)
    return results


@torch.inference_mode()
def measure_layers(
    model: nn.Module, candidates: Mapping[str, Weights], windows: Tensor
) -> dict[str, dict[str, float]]:
    """|f'(x) - f(x)| / |f(x) - x| of each decoder layer f on what the full model feeds it."""
    changed = {candidate: defaultdict[str, float](float) for candidate in candidates}
    added = defaultdict[str, float](float)

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        linears = decoder_linears(layer, f"{name}.")
        exact = {path: linear.weight.detach() for path, linear in linears.items()}

        def again(_layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            added[name] += float((output - args[0]).square().sum())
            for candidate, weights in candidates.items():
                place(linears, weights)
                change = layer.forward(*args, **kwargs) - output
                changed[candidate][name] += float(change.square().sum())
            place(linears, exact)

        return layer.register_forward_hook(again, with_kwargs=True)

    hooks = [watch(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]
    for batch in windows.split(8):
        model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        candidate: {name: math.sqrt(of[name] / added[name]) for name in added}
        for candidate, of in changed.items()
    }


@torch.inference_mode()
def measure_losses(
    model: nn.Module, candidates: Mapping[str, Weights], windows: Tensor
) -> dict[str, tuple[float, float]]:
    """KL divergence from full precision and perplexity, each with all its weights in place."""
    linears = decoder_linears(model)
    exact = {name: linear.weight.detach() for name, linear in linears.items()}
    divergence = defaultdict[str, float](float)
    surprise = defaultdict[str, float](float)
    for batch in windows.split(8):
        full = F.log_softmax(model(batch).logits[:, :-1], dim=-1)
        for candidate, weights in candidates.items():
            place(linears, weights)
            mixed = F.log_softmax(model(batch).logits[:, :-1], dim=-1)
            divergence[candidate] += float((full.exp() * (full - mixed)).sum(dtype=torch.double))
            chosen = mixed.gather(-1, batch[:, 1:, None])
            surprise[candidate] -= float(chosen.sum(dtype=torch.double))
        place(linears, exact)
    count = windows[:, 1:].numel()
    return {name: (divergence[name] / count, math.exp(surprise[name] / count)) for name in surprise}


def place(linears: Mapping[str, nn.Linear], weights: Weights) -> None:
    for name, linear in linears.items():
        linear.weight = nn.Parameter(weights[name], requires_grad=False)
