import signal

from benchmarks.gpu.visit import main

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    main()
