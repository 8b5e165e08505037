"""The console command `grpo-stage`: one module a subcommand."""
