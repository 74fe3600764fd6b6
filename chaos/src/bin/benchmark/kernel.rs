//! What the kernel's books say of a process.

use std::fs;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, anyhow};

/// What a process has used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// In user space and in the kernel, of all its threads.
    pub(crate) cpu: Duration,
    /// Bytes that are in memory now.
    pub(crate) resident: u64,
    /// The most that there were.
    pub(crate) peak: u64,
}

impl Usage {
    /// Of this process, since it began.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let stat = read(pid, "stat")?;
        // The name, in parentheses, may hold anything; what follows is proc_pid_stat(5) from 3 on.
        let (_, after) = stat.rsplit_once(") ").context("a line of stat has a name")?;
        let ticks: Vec<u64> =
            after.split(' ').skip(UTIME - 3).take(2).map(parse).collect::<Result<_, _>>()?;
        let cpu = Duration::from_millis(ticks.iter().sum::<u64>() * TICK_MS);
        let status = read(pid, "status")?;
        Ok(Self { cpu, resident: kib(&status, "VmRSS:")?, peak: kib(&status, "VmHWM:")? })
    }
}

fn read(pid: u32, file: &str) -> anyhow::Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))
}

/// A value of `status`, in bytes.
fn kib(status: &str, name: &str) -> anyhow::Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let line = line.ok_or_else(|| anyhow!("status has no {name}"))?;
    Ok(parse::<u64>(line.trim().trim_end_matches(" kB"))? * 1024)
}

fn parse<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    text: &str,
) -> anyhow::Result<T> {
    text.parse().with_context(|| format!("{text:?} is no number"))
}

/// The number of this field, from 1.
const UTIME: usize = 14;
/// The kernel tells times to programs in hundredths of a second, on every machine that we run on.
const TICK_MS: u64 = 10;
