"""The host's launcher, without the kernel that DeepSpeed compiles on a CPU: 35 seconds, and nothing here calls it."""

import runpy


def leave_out_kernels() -> None:
    """Have DeepSpeed find none that this machine can compile, without a search for compilers."""
    from deepspeed import ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)


if __name__ == "__main__":
    from llamafactory import launcher

    leave_out_kernels()
    runpy.run_path(launcher.__file__, run_name="__main__")
