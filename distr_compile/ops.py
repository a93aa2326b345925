"""Importing this module registers ``torch.ops.distr.attention``.

A program that was saved with attention rewritten needs the line ``import distr_compile.ops`` before
it is loaded. ``import distr_compile`` does the same where torch was imported before.
"""

from __future__ import annotations

from distr_compile.lowering.op import call

__all__ = ["call"]
