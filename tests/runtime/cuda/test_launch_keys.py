"""What is compiled while a model is served: nothing."""

from launch_keys import compiled_late


def test_after_the_warm_up_no_step_compiles_a_kernel() -> None:
    # With 20 KV heads, 33 to 37 sequences lie between two sizes that graphs are captured for, and
    # the kernel that plans attention has its own width for them.
    assert compiled_late(heads=20, kv_heads=20, max_seqs=40) == []
