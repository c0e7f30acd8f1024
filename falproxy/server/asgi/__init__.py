"""The proxy as an ASGI application: each request is a connection in memory to the HTTP server."""
