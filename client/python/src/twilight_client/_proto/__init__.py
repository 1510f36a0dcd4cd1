"""The generated messages of proto/twilight/v1, whose comments document them."""

from .twilight.v1 import error_pb2, lease_pb2, memory_pb2, step_pb2, twilight_pb2

__all__ = ["error_pb2", "lease_pb2", "memory_pb2", "step_pb2", "twilight_pb2"]
