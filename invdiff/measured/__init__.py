"""Learning from measurements alone: examples, their splits and lifts, and methods that no image is ever shown to."""

from invdiff.measured.examples import CONTEXT, HELD, TARGET, Example, Splitting, alike, example_of
from invdiff.measured.forward import ForwardModelMethod, ForwardModelTask
from invdiff.measured.method import MeasuredLearning, Method
from invdiff.measured.model import ForwardModel, Inputs, MeasuredInfo, inputs_of, signal
from invdiff.measured.response import Lift, Response, lift, nothing, response_of

__all__ = [
    "CONTEXT",
    "HELD",
    "TARGET",
    "Example",
    "ForwardModel",
    "ForwardModelMethod",
    "ForwardModelTask",
    "Inputs",
    "Lift",
    "MeasuredInfo",
    "MeasuredLearning",
    "Method",
    "Response",
    "Splitting",
    "alike",
    "example_of",
    "inputs_of",
    "lift",
    "nothing",
    "response_of",
    "signal",
]
