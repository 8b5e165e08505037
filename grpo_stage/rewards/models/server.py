"""Scores from the host's reward server (`reward_model_type: api`), which gets texts with their special tokens."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from transformers import PreTrainedTokenizerBase

from grpo_stage.records.redaction import mask_text


logger = logging.getLogger(f"llamafactory.{__name__}")  # seen wherever the host's messages are

RETRY_WAITS_S = (1.0, 4.0, 16.0)
"""Seconds to wait before each further request: a server or a proxy that restarts is no reason to end a run."""
SHOWN_CHARACTERS = 300


class RewardServerError(RuntimeError):
    """The reward server did not answer with a score for each text."""


class _PassingError(RewardServerError):
    """No connection, or a status of 5xx: the next request may be answered."""


class ServerScorer:
    """Scores token sequences by the server at one address."""

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, timeout_s: float) -> None:
        """
        Args:
            url: `reward_model`.
            tokenizer: the policy's.
            timeout_s: seconds for one request: `reward_timeout`.
        """
        self._url, self._shown_url = url, mask_text(url)
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s

    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """A score for each sequence.

        Raises:
            RewardServerError: if there are none. A failure that may pass is one only after further requests.
        """
        for wait_s in RETRY_WAITS_S:
            try:
                return self._request(sequences)
            except _PassingError as error:
                logger.warning(f"{error}. It is asked again in {wait_s:g} s.")
                time.sleep(wait_s)
        return self._request(sequences)

    def check(self) -> None:
        """Ask for one score.

        Raises:
            ValueError: if there is none.
        """
        assert self._tokenizer.eos_token_id is not None, "the host gives every tokenizer one"
        try:
            self._request([(self._tokenizer.eos_token_id,)])
        except RewardServerError as error:
            raise ValueError(
                f"`reward_model: {self._shown_url}` with `reward_model_type: api` is no reward server that answers: "
                f"{error}. Start one with `llamafactory-cli api` and `stage: rm`, and give the whole address, for "
                "example `http://localhost:8000/v1/score/evaluation`."
            ) from error

    def _request(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        texts = self._tokenizer.batch_decode([list(each) for each in sequences], skip_special_tokens=False)
        # Never cut a text, whose end is what is scored: it has at most as many tokens as bytes, and one more where the
        # tokenizer puts a space before it.
        max_length = 1 + max(len(text.encode()) for text in texts)
        payload = {"model": "model", "messages": texts, "max_length": max_length}
        request = Request(self._url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self._timeout_s) as response:
                status, body = response.status, response.read().decode(errors="replace")
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:SHOWN_CHARACTERS]
            kind = _PassingError if error.code >= 500 else RewardServerError
            raise kind(f"{self._shown_url} answered with status {error.code}: {said}") from error
        except (OSError, HTTPException) as error:
            if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
                raise RewardServerError(
                    f"{self._shown_url} did not answer within {self._timeout_s:g} s (`reward_timeout`)"
                ) from error
            raise _PassingError(f"{self._shown_url} did not answer ({type(error).__name__}: {error})") from error
        scores = _scores(body)
        if scores is None:
            raise RewardServerError(
                f"{self._shown_url} answered with status {status}, but with no list of finite scores: "
                f"{body[:SHOWN_CHARACTERS]}"
            )
        if len(scores) != len(texts):
            raise RewardServerError(f"{self._shown_url} answered with {len(scores)} scores for {len(texts)} texts")
        return scores


def _scores(body: str) -> list[float] | None:
    try:
        scores: Any = json.loads(body)["scores"]
    except (ValueError, LookupError, TypeError):  # no JSON, no scores, no mapping
        return None
    if not isinstance(scores, list):
        return None
    if not all(type(score) in (int, float) and abs(score) <= sys.float_info.max for score in scores):
        return None
    return [float(score) for score in scores]
