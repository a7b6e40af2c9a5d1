"""The code that runs inside a worker process. A worker imports every module here, so imports must be few."""
