"""Models as graphs that other run-times take: any size, PyTorch's plain operators alone."""

from upfeat.portable import jbu, neighbourhood
from upfeat.portable.form import PORTABLE, FixedForm, Form, form_of

__all__ = ["PORTABLE", "FixedForm", "Form", "form_of", "jbu", "neighbourhood"]
