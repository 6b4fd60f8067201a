"""The model that is measured, and how much of everything; a dry run has the same in tiny."""

from dataclasses import dataclass

from morphserve.quantize.architecture import Architecture, Rope


def _architecture(
    layers: int, hidden: int, inner: int, heads: int, kv: int, dim: int, vocab: int, longest: int
) -> Architecture:
    return Architecture(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=dim,
        vocab_size=vocab,
        max_position=longest,
        norm_eps=1e-5,
        rope=Rope(500000.0),
        tied_head=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="bfloat16",
        eos_token_ids=(),
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    architecture: Architecture
    group: int
    block_tokens: int
    batches: tuple[int, ...]  # that decode at once
    context: int  # tokens of each of them
    attention: tuple[tuple[int, int], ...]  # (batch, context), the most important first
    runs: tuple[int, ...]  # blocks of one layer that lie side by side
    blocks: tuple[int, ...]  # tokens per block
    prompts: tuple[int, ...]  # tokens
    rows: tuple[int, ...]  # of a linear's input
    copy_bytes: int


EIGHT_B = Sizes(
    architecture=_architecture(32, 4096, 14336, 32, 8, 128, 128256, 8192),
    group=128,
    block_tokens=32,
    batches=(1, 8, 32, 64, 128, 256),
    context=1024,
    attention=(
        *((64, 1024), (64, 4096), (1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024)),
        *((1, 4096), (8, 4096), (32, 4096), (128, 4096)),
    ),
    runs=(38, 8, 1),
    blocks=(32, 16, 64),
    prompts=(1024, 4096, 16384),
    rows=(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    copy_bytes=4 << 30,
)
TINY = Sizes(
    architecture=_architecture(2, 64, 96, 4, 2, 16, 128, 8192),
    group=32,
    block_tokens=16,
    batches=(1, 2),
    context=24,
    attention=((2, 24), (1, 40)),
    runs=(3, 1),
    blocks=(16, 32),
    prompts=(20,),
    rows=(1, 33),
    copy_bytes=1 << 16,
)

# Published measurements of vLLM 0.24's kernels (FlashAttention 3) on an H200, 8B shape, from
# ai-dynamo/aiconfigurator, systems/data/h200_sxm: microseconds of one layer's decode attention.
ATTENTION_US = {  # by (batch, context)
    (1, 1024): 13.6,
    (8, 1024): 17.4,
    (32, 1024): 46.8,
    (64, 1024): 80.7,
    (128, 1024): 148.6,
    (256, 1024): 272.5,
    (1, 4096): 16.6,
    (8, 4096): 49.4,
    (32, 4096): 135.5,
    (64, 4096): 270.9,
    (128, 4096): 492.6,
}
PREFILL_US = {1024: 35.0, 4096: 268.0, 16384: 3370.0}  # one layer's attention over one prompt
LINEARS_US = {1: 121.0, 8: 121.0, 32: 133.0, 64: 135.0, 128: 138.0, 256: 172.0}  # of one layer
# Milliseconds of a decode step at 1024 tokens of context: those kernels, 10 us of small ones per
# layer, and the head.
STEP_MS = {1: 4.9, 8: 5.1, 32: 6.4, 64: 7.6, 128: 9.8, 256: 14.9}
