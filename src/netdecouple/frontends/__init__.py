"""Adapters: networks of a framework behind `netdecouple.network`. They do no linear algebra."""
