"""llama.cpp, through llama-cpp-python's low-level calls, on the workload: python llama_side.py GGUF

Decoding and choosing are done as in its batched-bench, plus the greedy choice. It keeps its
own defaults, among them K and V in float16.
"""

import numpy as np
from llama_cpp import llama_cpp as api
from workload import (
    MAX_BATCH,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    VOCAB,
    Answers,
    Generate,
    Prompt,
    Watch,
    serve,
)

MAX_TOKENS = 2048  # of one decode call


def load(file: str, threads: int) -> Generate:
    api.llama_log_set(QUIET, None)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = MAX_BATCH * (PROMPT_TOKENS + OUTPUT_TOKENS)
    params.n_batch = MAX_TOKENS
    params.n_seq_max = MAX_BATCH
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params)
    assert context, "llama.cpp could not make a context"
    batch = api.llama_batch_init(MAX_TOKENS, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """The next token after each wanted row; rows are (token, position, sequence, wanted)."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert api.llama_decode(context, batch) == 0
        return [greedy(i) for i, row in enumerate(rows) if row[3]]

    def greedy(row: int) -> int:
        logits = api.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, shape=(VOCAB,)).argmax())

    def generate(given: list[Prompt]) -> Answers:
        api.llama_memory_clear(api.llama_get_memory(context), False)
        watch = Watch(len(given))
        rows = [
            (token, position, i, position == PROMPT_TOKENS - 1)
            for i, prompt in enumerate(given)
            for position, token in enumerate(prompt)
        ]
        latest = [
            token
            for start in range(0, len(rows), MAX_TOKENS)
            for token in decode(rows[start : start + MAX_TOKENS])
        ]
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + OUTPUT_TOKENS):
            for i, token in enumerate(latest):
                watch.add(i, [token])
            if position < PROMPT_TOKENS + OUTPUT_TOKENS - 1:
                latest = decode([(token, position, i, True) for i, token in enumerate(latest)])
        return watch.answers()

    return generate


QUIET = api.llama_log_callback(lambda *_: None)

if __name__ == "__main__":
    serve(load)
