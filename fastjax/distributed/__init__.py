"""One run of several processes: which of them this is, how they meet, who writes, and how they are started on one machine.

Each file has one job: `cluster` finds out, `start` joins, `roles` says who writes and lets processes wait for each other,
`absent` tells whose failure a failure is, `launch` starts and watches the processes of one machine. Arrays that lie on
several processes: `fastjax.parallel.hosts`.
"""
