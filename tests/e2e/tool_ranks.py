"""Tool formats in which a model without any training calls tools, and a rank of a run with them: `tool_ranks.py
recipe.yaml`."""

import json

from llamafactory.data import tool_utils
from llamafactory.train.tuner import run_exp


class Always(tool_utils.DefaultToolUtils):
    """A format in which most of what a model without any training writes is a call."""

    @staticmethod
    def function_formatter(functions: list[tool_utils.FunctionCall]) -> str:
        return f"CALL {functions[0].name} {functions[0].arguments}"

    @staticmethod
    def tool_extractor(content: str) -> str | list[tool_utils.FunctionCall]:
        if content.startswith("CALL "):
            _, name, arguments = content.split(" ", 2)
            return [tool_utils.FunctionCall(name, arguments)]
        if len(content) % 3 == 0:
            return content
        return [tool_utils.FunctionCall("count" if len(content) % 2 else "shout", json.dumps({"text": content}))]


class Moves(Always):
    """All that is written is a move of a game, up to a number."""

    @staticmethod
    def tool_extractor(content: str) -> str | list[tool_utils.FunctionCall]:
        if content.startswith("CALL "):
            return Always.tool_extractor(content)
        move = str(len(content) % 20 + 1)
        return [tool_utils.FunctionCall("act", json.dumps({"action": move}))]


FORMATS = {"always": Always(), "moves": Moves()}


if __name__ == "__main__":
    tool_utils.TOOLS.update(FORMATS)
    run_exp()
