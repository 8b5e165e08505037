"""The host's launcher, without the kernel that DeepSpeed compiles on a CPU: 35 seconds, and nothing here calls it."""

import runpy


def leave_out_kernels() -> None:
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    from llamafactory import launcher

    leave_out_kernels()
    runpy.run_path(launcher.__file__, run_name="__main__")
