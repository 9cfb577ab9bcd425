"""The rules that every party of a run follows: state, committees, assignment, messages, requests, limits."""
