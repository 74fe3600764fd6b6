//! `process_*` and `proxy_build_info`, read from /proc with each scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use steadfast_process::Clock;

pub(super) fn register(registry: &mut Registry, clock: Arc<dyn Clock>) {
    let info = Info::new([("version", env!("CARGO_PKG_VERSION")), ("vendor", "steadfast")]);
    // `Info` adds the `_info` of the name.
    registry.register("proxy_build", "The version of this proxy", info);
    let started_secs = clock.now().as_millis() as f64 / 1000.0;
    registry.register_collector(Box::new(Process { started_secs }));
}

#[derive(Debug)]
struct Process {
    /// Since the epoch.
    started_secs: f64,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(stat) = Stat::read() else { return Ok(()) };
        let mut cpu = encoder.encode_descriptor(
            "process_cpu_seconds",
            "CPU time that the process has used",
            None,
            MetricType::Counter,
        )?;
        cpu.encode_counter::<NoLabelSet, f64, u64>(&stat.cpu_secs, None)?;
        for (name, help, value) in [
            ("process_open_fds", "Open files", stat.open_files as f64),
            ("process_max_fds", "The most files that may be open", stat.open_files_max as f64),
            ("process_resident_memory_bytes", "Memory in RAM", stat.resident_bytes as f64),
            ("process_virtual_memory_bytes", "Address space", stat.virtual_bytes as f64),
            ("process_threads", "Threads", stat.threads as f64),
            ("process_start_time_seconds", "When it started", self.started_secs),
        ] {
            let mut gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode_gauge(&value)?;
        }
        Ok(())
    }
}

struct Stat {
    cpu_secs: f64,
    open_files: usize,
    open_files_max: u64,
    resident_bytes: u64,
    virtual_bytes: u64,
    threads: u64,
}

impl Stat {
    /// `None` where there is no /proc.
    fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the process, in parentheses, may hold anything: fields count from its end
        // (proc_pid_stat(5): utime is field 14, the first behind the name is 3).
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let status = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            value.split_whitespace().next()?.parse::<u64>().ok()
        };
        let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
        let open_files_max = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
        Some(Self {
            cpu_secs: (field(14)? + field(15)?) as f64 / TICKS_PER_SECOND,
            open_files: std::fs::read_dir("/proc/self/fd").ok()?.count(),
            open_files_max: open_files_max.and_then(|max| max.parse().ok()).unwrap_or(u64::MAX),
            // In KiB whatever the size of a page.
            resident_bytes: status("VmRSS:")? * 1024,
            virtual_bytes: status("VmSize:")? * 1024,
            threads: status("Threads:")?,
        })
    }
}

/// USER_HZ, which is 100 on every architecture that Linux has.
const TICKS_PER_SECOND: f64 = 100.0;
