"""Models rewritten for export: one graph of PyTorch's plain operators for images of any size."""

from upfeat.portable import jbu, neighbourhood
from upfeat.portable.form import PORTABLE, FixedForm, Form, form_of

__all__ = ["PORTABLE", "FixedForm", "Form", "form_of", "jbu", "neighbourhood"]
