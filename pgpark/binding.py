"""From one description of a call to a method of sync pools and an awaitable one of asyncio pools.

A description is a function of calls/. As an attribute of both kinds of pool it becomes a method with the arguments of
the description, which returns the result on a `Pool` and a coroutine of it on an `AsyncPool`. Type checkers see that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Generic, TypeAlias, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python
from typing_extensions import ParamSpec

from pgpark import telemetry
from pgpark.calls import Call
from pgpark.errors import BadInputError, BadResultError, one_line
from pgpark.models import Message, Submitted

if TYPE_CHECKING:
    from pgpark.pool import AsyncPool, BasePool, Pool

P = ParamSpec("P")
T = TypeVar("T")
PayloadT = TypeVar("PayloadT")
ResultT = TypeVar("ResultT")
Later: TypeAlias = Coroutine[Any, Any, T]


class Types(Generic[PayloadT, ResultT]):
    """How payloads and results are converted; None: as they are."""

    def __init__(self, payload: Any = None, result: Any = None) -> None:
        self._payload = None if payload is None else TypeAdapter(payload)
        self._result = None if result is None else TypeAdapter(result)
        self._names = getattr(payload, "__name__", str(payload)), getattr(result, "__name__", str(result))

    def encode(self, payload: Any) -> Any:
        """A payload as JSON values. Raises BadInputError when it does not fit."""
        try:
            if self._payload is None:
                return to_jsonable_python(payload)
            return self._payload.dump_python(self._payload.validate_python(payload), mode="json")
        except ValidationError as error:
            raise BadInputError(f"the payload does not fit {self._names[0]}: {problems(error)}") from None
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            raise BadInputError(f"the payload is not JSON: {one_line(error)}") from error

    def encode_all(self, tasks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same for the payloads of many tasks. Raises BadInputError naming the element, from 1."""
        encoded = []
        for place, task in enumerate(tasks, start=1):
            try:
                rest = {key: value for key, value in task.items() if key != "payload"}
                plain = {} if "payload" not in task else {"payload": self.encode(task["payload"])}
                encoded.append(to_jsonable_python(rest) | plain)
            except BadInputError as error:
                raise BadInputError(f"element {place}: {error}", place) from error
        return encoded

    def decode(self, message: Message) -> Message[ResultT]:
        """A message with its payload as the type of results. Raises BadResultError when it does not fit."""
        if self._result is None or message.status != "completed":
            return message
        try:
            return message.model_copy(update={"payload": self._result.validate_python(message.payload)})
        except ValidationError as error:
            text = f"the result of task {message.task_id} does not fit {self._names[1]}: {problems(error)}"
            raise BadResultError(text, message) from None


def problems(error: ValidationError) -> str:
    """What is wrong, on one line and without the values."""
    found = [
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem["loc"] else problem["msg"]
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return one_line(Exception("; ".join(found)))


class Plain(Generic[P, T]):
    """A call whose arguments are those of the method."""

    def __init__(self, describe: Callable[P, Call[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, pool: None, owner: object) -> Plain[P, T]: ...
    @overload
    def __get__(self, pool: Pool[Any, Any], owner: object) -> Callable[P, T]: ...
    @overload
    def __get__(self, pool: AsyncPool[Any, Any], owner: object) -> Callable[P, Later[T]]: ...
    def __get__(self, pool: Any, owner: object) -> Any:
        return self if pool is None else _method(pool, self._describe, self._describe)


class OfPool(Generic[P, T]):
    """A call that has the name of the pool as its first argument."""

    def __init__(self, describe: Callable[Concatenate[str, P], Call[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, pool: None, owner: object) -> OfPool[P, T]: ...
    @overload
    def __get__(self, pool: Pool[Any, Any], owner: object) -> Callable[P, T]: ...
    @overload
    def __get__(self, pool: AsyncPool[Any, Any], owner: object) -> Callable[P, Later[T]]: ...
    def __get__(self, pool: Any, owner: object) -> Any:
        if pool is None:
            return self
        return _method(pool, self._describe, functools.partial(self._describe, pool.name))


class Submit(Generic[P]):
    """The call that takes a payload after the name of the pool."""

    def __init__(self, describe: Callable[Concatenate[str, Any, P], Call[Submitted]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, pool: None, owner: object) -> Submit[P]: ...
    @overload
    def __get__(
        self, pool: Pool[PayloadT, Any], owner: object
    ) -> Callable[Concatenate[PayloadT | Mapping[str, Any], P], Submitted]: ...
    @overload
    def __get__(
        self, pool: AsyncPool[PayloadT, Any], owner: object
    ) -> Callable[Concatenate[PayloadT | Mapping[str, Any], P], Later[Submitted]]: ...
    def __get__(self, pool: Any, owner: object) -> Any:
        if pool is None:
            return self

        def describe(payload: Any, *args: P.args, **kwargs: P.kwargs) -> Call[Submitted]:
            return self._describe(pool.name, pool.types.encode(payload), *args, **kwargs)

        return _traced(pool, self._describe, describe)


class SubmitMany(Generic[P, T]):
    """The call that takes many tasks after the name of the pool."""

    def __init__(self, describe: Callable[Concatenate[str, Any, P], Call[T]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, pool: None, owner: object) -> SubmitMany[P, T]: ...
    @overload
    def __get__(self, pool: Pool[Any, Any], owner: object) -> Callable[[Iterable[Mapping[str, Any]]], T]: ...
    @overload
    def __get__(
        self, pool: AsyncPool[Any, Any], owner: object
    ) -> Callable[[Iterable[Mapping[str, Any]]], Later[T]]: ...
    def __get__(self, pool: Any, owner: object) -> Any:
        if pool is None:
            return self

        def describe(tasks: Iterable[Mapping[str, Any]], *args: P.args, **kwargs: P.kwargs) -> Call[T]:
            return self._describe(pool.name, pool.types.encode_all(tasks), *args, **kwargs)

        return _traced(pool, self._describe, describe)


class Fetch(Generic[P]):
    """The call that returns messages, whose payloads are converted."""

    def __init__(self, describe: Callable[Concatenate[str, P], Call[list[Message]]]) -> None:
        self._describe = describe
        self.__doc__ = describe.__doc__

    @overload
    def __get__(self, pool: None, owner: object) -> Fetch[P]: ...
    @overload
    def __get__(self, pool: Pool[Any, ResultT], owner: object) -> Callable[P, list[Message[ResultT]]]: ...
    @overload
    def __get__(self, pool: AsyncPool[Any, ResultT], owner: object) -> Callable[P, Later[list[Message[ResultT]]]]: ...
    def __get__(self, pool: Any, owner: object) -> Any:
        if pool is None:
            return self

        def describe(*args: P.args, **kwargs: P.kwargs) -> Call[Any]:
            fetched = self._describe(pool.name, *args, **kwargs)
            return fetched.then(lambda messages: [pool.types.decode(message) for message in messages])

        return _method(pool, self._describe, describe)


def _method(pool: BasePool[Any, Any], named: Callable[..., Any], describe: Callable[..., Call[Any]]) -> Any:
    @functools.wraps(named)
    def method(*args: Any, **kwargs: Any) -> Any:
        return pool.run(describe(*args, **kwargs))

    return method


def _traced(pool: BasePool[Any, Any], named: Callable[..., Any], describe: Callable[..., Call[Any]]) -> Any:
    """The same for a submit, whose tasks belong to the trace that is active."""

    @functools.wraps(named)
    def method(*args: Any, **kwargs: Any) -> Any:
        call = describe(*args, **kwargs)
        if (tracing := telemetry.tracer()) is None:
            return pool.run(call)
        submit = telemetry.submit_async if inspect.iscoroutinefunction(pool.run) else telemetry.submit
        return submit(pool, tracing, call)

    return method
