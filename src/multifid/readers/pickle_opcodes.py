"""The instructions of pickles, protocols 2 to 5, carried out by a machine of our own that has nothing to call.

Python's unpickler looks up any name in any package and calls it. Here GLOBAL and STACK_GLOBAL hand over a pair of texts
to whoever reads the pickle, who says what it stands for; REDUCE, NEWOBJ and BUILD work on these alone. What an
instruction is: `pickletools` of the standard library.
"""

import struct
from collections.abc import Callable
from typing import Any

Named = Callable[[str, str], Any]  # (module, name) -> what stands for it
Persistent = Callable[[Any], Any]

MOST = 1 << 16  # instructions of a pickle; a graph takes some hundreds, whatever its size
HEAVIEST = 1 << 27  # bytes or members of all that its calls make
MARK = object()
CONSTANTS: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None, 0x88: lambda: True, 0x89: lambda: False, ord("}"): dict, ord("]"): list, ord(")"): tuple,
    0x8F: set,
}  # fmt: skip
NUMBERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i", ord("G"): ">d"}
# texts and bytes: how their length is written, and what they are
TEXTS = {0x8C: "<B", ord("X"): "<I", 0x8D: "<Q"}
BYTES = {ord("C"): "<B", ord("B"): "<I", 0x8E: "<Q", 0x96: "<Q", ord("U"): "<B", ord("T"): "<I"}
LONGS = {0x8A: "<B", 0x8B: "<I"}
GETS = {ord("h"): "<B", ord("j"): "<I"}
PUTS = {ord("q"): "<B", ord("r"): "<I"}
TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
SKIPPED = {0x80: 1, 0x95: 8}  # PROTO and FRAME, and the bytes behind them


class Machine:
    """One pickle after the other out of some bytes. ValueError for an instruction that is not known, or is damaged."""

    def __init__(self, content: bytes, named: Named, persistent: Persistent, most: int = MOST) -> None:
        self.content, self.named, self.persistent, self.most = content, named, persistent, most
        self.place, self.made = 0, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What the next pickle holds; `place` is then behind it."""
        self.stack, self.memo = [], {}
        for _ in range(self.most):
            code = self.content[self.place]
            self.place += 1
            if code == ord("."):
                return self.stack.pop()
            self._step(code)
        raise ValueError("a pickle of too many instructions")

    def _step(self, code: int) -> None:
        if code in CONSTANTS:
            self.stack.append(CONSTANTS[code]())
        elif code in NUMBERS:
            self.stack.append(self._number(NUMBERS[code]))
        elif code in TEXTS:
            self.stack.append(self._take(self._number(TEXTS[code])).decode("utf-8", "surrogatepass"))
        elif code in BYTES:
            self.stack.append(self._take(self._number(BYTES[code])))
        elif code in LONGS:
            self.stack.append(int.from_bytes(self._take(self._number(LONGS[code])), "little", signed=True))
        elif code in GETS:
            self.stack.append(self.memo[self._number(GETS[code])])
        elif code in PUTS:
            self.memo[self._number(PUTS[code])] = self.stack[-1]
        elif code in TUPLES:
            self.stack[-TUPLES[code] :] = [tuple(self.stack[-TUPLES[code] :])]
        elif code in SKIPPED:
            self._take(SKIPPED[code])
        elif code in _INSTRUCTIONS:
            _INSTRUCTIONS[code](self)
        else:
            raise ValueError(f"instruction {code:#x} of a pickle is not known here")

    def _take(self, size: int) -> bytes:
        taken = self.content[self.place : self.place + size]
        if len(taken) < size:
            raise ValueError("a pickle ends within a value")
        self.place += size
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing in a pickle")
        taken = self.stack[at + 1 :]
        del self.stack[at:]
        return taken

    def _line(self) -> str:
        end = self.content.index(b"\n", self.place)
        line, self.place = self.content[self.place : end], end + 1
        return line.decode("utf-8")

    def _global(self) -> None:
        module = self._line()
        self.stack.append(self.named(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.named(str(module), str(name)))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        result = self.stack.pop()(*arguments)
        self.made += len(result) if isinstance(result, bytes | tuple | dict) else 0
        if self.made > HEAVIEST:
            raise ValueError("a pickle grows beyond what is plausible")
        self.stack.append(result)

    def _new_with_names(self) -> None:
        named, arguments = self.stack.pop(), self.stack.pop()
        self.stack.append(self.stack.pop()(*arguments, **named))

    def _build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].set_state(state)

    def _append(self) -> None:
        value = self.stack.pop()
        _of(self.stack[-1], list).append(value)

    def _appends(self) -> None:
        values = self._since_mark()
        _of(self.stack[-1], list).extend(values)

    def _add(self) -> None:
        values = self._since_mark()
        _of(self.stack[-1], set).update(values)

    def _set(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _of(self.stack[-1], dict)[key] = value

    def _sets(self) -> None:
        values = self._since_mark()
        _of(self.stack[-1], dict).update(zip(values[::2], values[1::2], strict=True))

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _persistent(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a pickle treats {type(value).__name__} as {kind.__name__}")
    return value


_INSTRUCTIONS: dict[int, Callable[[Machine], object]] = {
    ord("("): lambda machine: machine.stack.append(MARK),
    ord("0"): lambda machine: machine.stack.pop(),
    ord("1"): lambda machine: machine._since_mark(),
    ord("2"): lambda machine: machine.stack.append(machine.stack[-1]),
    ord("t"): lambda machine: machine.stack.append(tuple(machine._since_mark())),
    ord("c"): Machine._global,
    0x93: Machine._stack_global,
    ord("R"): Machine._reduce,
    0x81: Machine._reduce,  # NEWOBJ: a class, and arguments
    0x92: Machine._new_with_names,
    ord("b"): Machine._build,
    ord("a"): Machine._append,
    ord("e"): Machine._appends,
    0x90: Machine._add,
    ord("s"): Machine._set,
    ord("u"): Machine._sets,
    0x94: Machine._memoize,
    ord("Q"): Machine._persistent,
}
