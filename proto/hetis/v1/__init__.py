"""The contract of the planning service and the node agents: messages, services, and stubs made from them.

Written in the ``.proto`` files beside this one; ``proto/generate.py`` makes the ``*_pb2*`` modules, which are never
edited. What the service does is in ``docs/api.md``.
"""
