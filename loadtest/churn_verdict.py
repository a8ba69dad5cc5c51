"""What came of the churn's replies: right, refused as they had to be, cut by a delete, or wrong. Knows no HTTP."""

from dataclasses import dataclass, field

from loadtest.churn_client import Answer
from loadtest.churn_names import NameBook, Version
from loadtest.churn_oracle import Oracle

_MAX_EXAMPLES = 5
_TAKEN_AWAY = "model_not_found"


@dataclass(slots=True)
class Verdict:
    """What came of all replies. All but the first lines must be zero."""

    tokens: int = 0
    replies: int = 0
    not_found: int = 0  # names that were, or may have been, deleted before
    aborted: int = 0  # under a delete that aborts
    wrong_tokens: int = 0
    wrong_versions: int = 0  # replies of a version that their name did not stand for
    lost: int = 0
    examples: list[str] = field(default_factory=list)

    def judge(self, answer: Answer, book: NameBook, oracle: Oracle, base: str) -> None:
        """Count one answer as what it is."""
        question = answer.question
        is_base = question.model == base
        may_be = set[Version]() if is_base else book.may_be(question.model, answer.sent, answer.headed)
        if not answer.is_whole and not answer.token_ids:
            self._judge_refusal(answer, book, may_be)
            return
        if answer.version not in ({None} if is_base else may_be - {None}):
            self.wrong_versions += 1
            self._note(f"{_said(answer)} was answered by version {str(answer.version)[:12]}, not of {may_be}")
        wrong = oracle.num_wrong(answer.version, question.prompt, answer.token_ids)
        if wrong:
            self.wrong_tokens += wrong
            whose = oracle.whose(question.prompt, answer.token_ids)
            self._note(f"{_said(answer)} of version {str(answer.version)[:12]} got {wrong} wrong tokens, {whose}")
        self.tokens += len(answer.token_ids)
        if answer.is_whole:
            self.replies += 1
        else:
            self._judge_cut(answer, book)

    def _judge_refusal(self, answer: Answer, book: NameBook, may_be: set[Version]) -> None:
        if answer.status == 404 and None in may_be:
            self.not_found += 1
        else:
            self._judge_cut(answer, book)

    def _judge_cut(self, answer: Answer, book: NameBook) -> None:
        """No whole reply: only a delete that aborts may do that, and it says so: 404, or an event in mid-stream."""
        is_said = answer.code == _TAKEN_AWAY and answer.status in (200, 404)
        if is_said and book.may_be_aborted(answer.question.model, answer.sent, answer.ended):
            self.aborted += 1
        else:
            self.lost += 1
            self._note(f"{_said(answer)} was lost: {answer.error}")

    def _note(self, example: str) -> None:
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(example)


def _said(answer: Answer) -> str:
    question = answer.question
    way = "streamed" if question.is_stream else "whole"
    return f"a {way} request of {question.max_tokens} tokens to {question.model}, prompt {question.prompt},"
