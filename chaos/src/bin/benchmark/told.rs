//! What was measured, beside what it may be.

use std::time::Duration;

use serde::Serialize;

use crate::args::Output;
use crate::swarm::Pushed;

/// What was measured.
pub(crate) struct Measured {
    pub(crate) workloads: u32,
    pub(crate) took: Duration,
    pub(crate) phases: Vec<Phase>,
    /// CPU of the controller: while everybody joined, while nothing was to be done, and for the
    /// rotation.
    pub(crate) joining_cpu: Duration,
    pub(crate) idle_cpu: Duration,
    pub(crate) idle: Duration,
    pub(crate) rotation_cpu: Duration,
    /// Of the controller, in bytes.
    pub(crate) rotation_peak: u64,
    /// Of each replica of identity.
    pub(crate) stream_bytes: Vec<u64>,
    pub(crate) pushes: Vec<Pushed>,
}

/// One phase of the rotation.
#[derive(Serialize)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) seconds: f64,
    /// How many had settled when it was left.
    pub(crate) acked: usize,
}

/// All that is told in the end.
#[derive(Serialize)]
pub(crate) struct Told {
    workloads: u32,
    rotation_seconds: f64,
    phases: Vec<Phase>,
    rows: Vec<Row>,
}

/// One number.
#[derive(Serialize)]
struct Row {
    what: String,
    measured: f64,
    unit: &'static str,
    /// `None`: it is only told.
    budget: Option<f64>,
}

impl Told {
    pub(crate) fn new(measured: Measured) -> Self {
        let Measured { workloads, phases, stream_bytes, pushes, .. } = measured;
        let row = |what: &str, measured, unit, budget| Row {
            what: what.to_owned(),
            measured,
            unit,
            budget,
        };
        let per_minute = |cpu: Duration| cpu.as_secs_f64() / measured.idle.as_secs_f64() * 60.0;
        let mut rows = vec![
            row(
                "controller, CPU of the rotation",
                measured.rotation_cpu.as_secs_f64(),
                "s",
                Some(CPU_S),
            ),
            row("controller, most memory", mib(measured.rotation_peak), "MiB", Some(MEMORY_MIB)),
            row("controller, CPU while all joined", measured.joining_cpu.as_secs_f64(), "s", None),
            row("controller, CPU of an idle minute", per_minute(measured.idle_cpu), "s", None),
        ];
        for (replica, bytes) in stream_bytes.iter().enumerate() {
            let what = format!("identity {}, memory of a stream", replica + 1);
            rows.push(row(&what, *bytes as f64 / 1024.0, "KiB", Some(STREAM_KIB)));
        }
        for Pushed { seq, median, last } in pushes {
            let (half, all) = (median.as_secs_f64(), last.as_secs_f64());
            rows.push(row(&format!("bundle {seq}, in use at the last"), all, "s", Some(PUSH_S)));
            rows.push(row(&format!("bundle {seq}, in use at half of all"), half, "s", None));
        }
        Self { workloads, rotation_seconds: measured.took.as_secs_f64(), phases, rows }
    }

    /// Whether nothing is over its budget.
    pub(crate) fn within(&self) -> bool {
        self.rows.iter().all(Row::within)
    }

    pub(crate) fn print(&self, output: Output) {
        match output {
            // Strings and numbers alone: serialising them cannot fail.
            Output::Json => println!("{}", serde_json::to_string_pretty(self).unwrap_or_default()),
            Output::Text => self.print_text(),
        }
    }

    fn print_text(&self) {
        let Self { workloads, rotation_seconds, .. } = self;
        println!("{workloads} workloads, a rotation of {rotation_seconds:.0} s");
        for Phase { name, seconds, acked } in &self.phases {
            println!("    {name:<12}{seconds:>8.1} s   {acked:>6} settled");
        }
        let budget = "budget";
        println!("{:<36}{:>10}     {budget:>10}", "", "measured");
        for row in &self.rows {
            let Row { what, measured, unit, budget } = row;
            let verdict = match budget {
                Some(_) if row.within() => "within budget",
                Some(_) => "OVER budget",
                None => "",
            };
            let budget = budget.map_or_else(String::new, |budget| format!("{budget:.0} {unit:<3}"));
            let line = format!("{what:<36}{measured:>10.2} {unit:<3} {budget:>10}  {verdict}");
            println!("{}", line.trim_end());
        }
    }
}

impl Row {
    fn within(&self) -> bool {
        self.budget.is_none_or(|budget| self.measured < budget)
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

const CPU_S: f64 = 10.0;
const MEMORY_MIB: f64 = 200.0;
const STREAM_KIB: f64 = 24.0;
const PUSH_S: f64 = 2.0;
