"""`python -m grpo_stage train x.yaml`: llamafactory-cli with the stage, also where GRPO_STAGE_DISABLE=1 is set."""

import os


def main() -> None:
    # Taken out of the environment, so that the processes torchrun starts know the stage as well.
    os.environ.pop("GRPO_STAGE_DISABLE", None)
    from .plugin.registration import install, run_cli

    install()
    run_cli()


if __name__ == "__main__":
    main()
