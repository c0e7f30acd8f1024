"""Django's own pages. /fal/ is not among them: asgi.py sends it to the proxy."""

from django.contrib import admin
from django.urls import path

urlpatterns = [path("admin/", admin.site.urls)]
