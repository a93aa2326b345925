"""Tests of the policy, by its parts: fields, document, errors, text, and the value itself."""
