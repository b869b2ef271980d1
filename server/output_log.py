"""What was generated, in the log (--enable-log-outputs)."""

from __future__ import annotations

import logging

from jaxpaged.async_engine import StepReport, Stream
from jaxpaged.request import CompletionOutput, RequestOutput, RequestOutputKind

log = logging.getLogger(__name__)


class OutputLog:
    """An observer that logs each text when its request ends, whether it was streamed or not. max_len: characters."""

    def __init__(self, max_len: int):
        self._max_len = max_len
        self._begun: dict[str, dict[int, str]] = {}  # request -> sample -> its text, so far: no more than is logged

    def submitted(self, stream: Stream) -> None:
        """Nothing has been generated."""

    def rejected(self, reason: str) -> None:
        """Nothing will be."""

    def stepped(self, report: StepReport, streams: dict[str, Stream]) -> None:
        for output in report.outputs:
            stream = streams.get(output.request_id)
            if stream is not None and isinstance(output, RequestOutput):
                self._take(output, stream.params.output_kind is RequestOutputKind.DELTA)

    def _take(self, output: RequestOutput, delta: bool) -> None:
        texts = self._begun.setdefault(output.request_id, {})
        for completion in output.outputs:
            before = texts.get(completion.index, "") if delta else ""
            texts[completion.index] = (before + completion.text)[: self._max_len]
            if completion.finish_reason is not None:
                self._tell(output.request_id, completion, texts[completion.index])
        if output.finished:
            del self._begun[output.request_id]

    def _tell(self, request_id: str, completion: CompletionOutput, text: str) -> None:
        log.info("finished %s/%d (%s): %r", request_id, completion.index, completion.finish_reason, text)
