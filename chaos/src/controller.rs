//! The controller of rotations: the real shell with the real machine inside, as a process that can
//! be frozen, killed between any two of its calls, and doubled.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::registry::Registry;
use steadfast_api::UnixTime;
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::store::{LEDGER_KEY, RESOURCES_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::{Revision, StoreError};
use steadfast_rotation::endings::Ended;
use steadfast_rotation::event_log::EventLog;
use steadfast_rotation::listing::Carries;
use steadfast_rotation::metrics::Metrics;
use steadfast_rotation::shell::{LookError, Parts};
use steadfast_rotation::{Anchors, Shell};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Wait;

use crate::faults::name_of;
use crate::mutant::Mutant;
use crate::ops::{Call, Op, Port, Reply, Task};
use crate::parts::MachineClock;
use crate::plan::Hazard;
use crate::replica::Heard;
use crate::world::{Event, TaskId, World};

/// The process of one controller.
pub(crate) struct ControllerHost {
    pub(crate) life: u32,
    pub(crate) frozen_until: UnixTime,
    pub(crate) clock: MachineClock,
    pub(crate) task: Option<Task>,
    /// What it saw last, written by the process itself.
    pub(crate) seen: Arc<Mutex<Seen>>,
    /// It dies at the so manieth call from now; `true`: when that has been done already.
    pub(crate) dies_at: Option<(u32, bool)>,
    pub(crate) cut_from_store: bool,
    /// The last pause, which grows while nothing changes.
    pause: Duration,
    waited_for: String,
}

/// What a controller says of itself.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) waiting: Option<Wait>,
    pub(crate) error: Option<String>,
}

impl World {
    /// Starts the n-th controller, or a new one in its place.
    pub(crate) fn start_controller(&mut self, index: usize) {
        let clock = match self.controllers.get(index) {
            Some(host) => host.clock.clone(),
            None => MachineClock::new(&self.time),
        };
        let life = self.controllers.get(index).map_or(0, |host| host.life + 1);
        let port = Port::default();
        let off = clock.clone();
        let told_time = match self.plan.wanted.mutant {
            Some(Mutant::NoFence) => clock.clone().hasty(),
            _ => clock.clone(),
        };
        let mut shell = Shell::new(Parts {
            listed: Box::new(|_| Vec::new()),
            anchors: Anchors::new(Arc::new(port.clone()), [], Arc::new(port.clone())),
            fleet: Arc::new(port.clone()),
            store: Arc::new(port.clone()),
            clock: Arc::new(told_time),
            clock_offset_ms: Box::new(move || Some(off.off_ms())),
            timings: self.plan.timings,
            anchor_lifetime: self.plan.anchor_life,
            namespaces: Namespaces {
                control: "steadfast".to_owned(),
                anchors: "steadfast".to_owned(),
            },
            held: Box::new(|| None),
            carries: Carries::Unless,
            ended: Box::new(Ended::default),
            mirrors_show: Box::new(|_| true),
            event_log: EventLog::default(),
            name: format!("controller#{index}"),
            metrics: Metrics::new(&mut Registry::default()),
        });
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (said, pause) = (Arc::clone(&seen), port.clone());
        // As `Shell::run`, but for how long the pauses are.
        let task = Task::new(port, async move {
            loop {
                let looked = shell.look().await;
                let again = match &looked {
                    Ok(looked) => looked.changed,
                    Err(LookError::Store(StoreError::Conflict { .. })) => true,
                    Err(_) => false,
                };
                {
                    let mut said = said.lock().unwrap();
                    said.waiting = Some(shell.waiting().clone());
                    let trouble = match looked {
                        Ok(looked) => looked.trouble,
                        Err(error) => Some(error),
                    };
                    said.error = trouble.map(|error| error.to_string());
                }
                pause.call(Op::Pause(again)).await;
            }
        });
        let host = ControllerHost {
            life,
            frozen_until: self.now,
            clock,
            task: Some(task),
            seen,
            dies_at: None,
            cut_from_store: false,
            pause: self.plan.look_every.0,
            waited_for: String::new(),
        };
        match self.controllers.get_mut(index) {
            Some(slot) => *slot = host,
            None => self.controllers.push(host),
        }
        self.go_on(TaskId::Controller(index));
    }

    pub(crate) fn kill_controller(&mut self, index: usize) {
        let host = &mut self.controllers[index];
        host.task = None;
        host.life += 1;
        host.dies_at = None;
        self.counts.killed += 1;
        self.tell(|| format!("controller {index} is killed"));
    }

    /// Lets a process go on until it waits again, and sends off what it asks.
    pub(crate) fn go_on(&mut self, id: TaskId) {
        let (life, task) = match id {
            TaskId::Controller(index) => {
                let host = &mut self.controllers[index];
                (host.life, host.task.as_mut())
            }
            TaskId::Replica(index) => {
                let host = &mut self.replicas[index];
                (host.life, host.task.as_mut())
            }
        };
        let Some(calls) = task.and_then(Task::go_on) else { return };
        for call in calls {
            if let Op::Pause(again) = call.op {
                self.rest(id, call, again);
                continue;
            }
            let at = self.now + self.call_trip();
            self.queue.push(at, Event::Call { task: id, life, call: Box::new(call) });
        }
    }

    fn rest(&mut self, id: TaskId, call: Call, again: bool) {
        let index = match id {
            TaskId::Replica(index) => return self.replica_rests(index, call),
            TaskId::Controller(index) => index,
        };
        let (least, most) = self.plan.look_every;
        let host = &mut self.controllers[index];
        let waits = {
            let seen = host.seen.lock().unwrap();
            let kind = seen.waiting.as_ref().map(std::mem::discriminant);
            format!("{kind:?} {:?}", seen.error)
        };
        let (fence, idle) = match &host.seen.lock().unwrap().waiting {
            Some(Wait::Fence { left }) => (Some(*left + Duration::from_millis(1)), false),
            waiting => (None, *waiting == Some(Wait::Nothing)),
        };
        let most = if idle { most * 6 } else { most };
        host.pause = match () {
            () if again => Duration::from_millis(1),
            () if host.waited_for == waits => (host.pause * 2).clamp(least, most),
            () => least,
        };
        host.waited_for = waits;
        let pause = fence.map_or(host.pause, |fence| host.pause.min(fence));
        let life = host.life;
        let pause = if again { pause } else { pause / 2 + self.draw(pause / 2) };
        self.queue.push(
            self.now + pause,
            Event::Answer { task: id, life, reply: Box::new(Reply::Resumed), answer: call.answer },
        );
    }

    fn call_trip(&mut self) -> Duration {
        if self.chance(1) { self.draw(Duration::from_secs(3)) } else { self.draw(CALL_TRIP_MAX) }
    }

    fn life_of(&self, id: TaskId) -> (u32, bool, UnixTime) {
        match id {
            TaskId::Controller(index) => {
                let host = &self.controllers[index];
                (host.life, host.cut_from_store, host.frozen_until)
            }
            TaskId::Replica(index) => {
                let host = &self.replicas[index];
                (host.life, host.cut_from_store, host.frozen_until)
            }
        }
    }

    /// A call has arrived: it is done whether or not its caller still lives, unless it died first.
    pub(crate) fn called(&mut self, task: TaskId, life: u32, call: Call) {
        let write = self.deadly_write(task, life, &call.op);
        let dies = self.countdown(task, life);
        if let (Some(write), Some(done)) = (write, dies) {
            let when = if done { "after" } else { "before" };
            self.count_fault(&format!("controller killed {when} {write}"));
        }
        if dies == Some(false) {
            return;
        }
        let Call { op, answer } = call;
        let reply = match op {
            Op::Ask(nonce) => return self.ask(task, life, nonce, answer),
            op => self.carry_out(task, op),
        };
        if dies.is_none() {
            let at = self.now + self.call_trip();
            let reply = Box::new(reply);
            self.queue.push(at, Event::Answer { task, life, reply, answer });
        }
    }

    /// Each kind of write kills the controller before it is done, the next of its kind after, and
    /// later ones by chance. Its kind is the phases that it leads from and to.
    fn deadly_write(&mut self, task: TaskId, life: u32, op: &Op) -> Option<String> {
        let Op::Cas { key, value: Some(value), .. } = op else { return None };
        let hazard = self.plan.wanted.hazard;
        if hazard != Hazard::DeadlyWrites
            || (task, self.controllers[0].life) != (TaskId::Controller(0), life)
        {
            return None;
        }
        let kind = if key == TRUST_DOMAIN_KEY {
            let next: TrustDomainState = serde_json::from_slice(value).unwrap();
            let next = next.rotation.map(|rotation| rotation.phase.name());
            format!("{} to {}", name_of(self.phase()), name_of(next))
        } else {
            // Without what it is the evidence of.
            key.split('/').take(2).collect::<Vec<_>>().join("/")
        };
        let seen = self.counts.deadly_writes.entry(kind.clone()).or_default();
        *seen += 1;
        let (deadly, done) = match *seen {
            1 => (true, false),
            2 => (true, true),
            _ => (self.chance(25), self.chance(50)),
        };
        if deadly && !self.faults.over {
            self.controllers[0].dies_at = Some((0, done));
        }
        Some(kind)
    }

    /// Whether the caller dies at this call: before it is done, or after.
    fn countdown(&mut self, task: TaskId, life: u32) -> Option<bool> {
        let TaskId::Controller(index) = task else { return None };
        let host = &mut self.controllers[index];
        if host.life != life {
            return None;
        }
        let (left, done) = host.dies_at?;
        if left > 0 {
            host.dies_at = Some((left - 1, done));
            return None;
        }
        self.kill_controller(index);
        if index == 0 {
            self.controller_died();
        }
        Some(done)
    }

    pub(crate) fn carry_out(&mut self, task: TaskId, op: Op) -> Reply {
        let away = || StoreError::Unavailable("it cannot be reached".to_owned());
        let cut = self.life_of(task).1;
        let vault = match task {
            TaskId::Controller(_) => self.anchor_keys.clone(),
            TaskId::Replica(_) => self.issuer_keys.clone(),
        };
        match op {
            Op::Get(_) if cut => Reply::Entry(Err(away())),
            Op::List(_) if cut => Reply::Entries(Err(away())),
            Op::Cas { .. } if cut => Reply::Written(Err(away())),
            Op::Get(key) => Reply::Entry(Ok(self.get(task, &key))),
            Op::List(prefix) => Reply::Entries(Ok(self.list(&prefix))),
            Op::Cas { key, expected, value } => {
                Reply::Written(self.compare_and_swap(task, &key, expected, value))
            }
            Op::MakeKey => Reply::Key(Ok(vault.make_one())),
            Op::Key(id) => Reply::Key(vault.get(id)),
            Op::Exists(id) => Reply::Exists(vault.holds(id)),
            Op::Keys => Reply::Keys(vault.ids()),
            Op::Destroy(id) => {
                self.invariant_s7_keys_last(task, id);
                vault.remove(id);
                Reply::Done(Ok(()))
            }
            Op::Ask(_) | Op::Pause(_) => Reply::Resumed,
        }
    }

    fn get(&mut self, task: TaskId, key: &str) -> Option<steadfast_platform::Entry> {
        let entry = self.store.get(key);
        if key == TRUST_DOMAIN_KEY
            && let (TaskId::Controller(index), Some(entry)) = (task, &entry)
        {
            self.truth.read_by(index, entry.revision);
        }
        entry
    }

    fn list(&self, prefix: &str) -> (Vec<steadfast_platform::Entry>, Revision) {
        let mut listed = self.store.list(prefix);
        if self.plan.wanted.mutant == Some(Mutant::ListOfStreams)
            && prefix.starts_with(RESOURCES_PREFIX)
        {
            let open: std::collections::BTreeSet<_> = self
                .workloads
                .iter()
                .filter(|workload| workload.stream.is_some())
                .map(|workload| workload.resource_key())
                .collect();
            listed.0.retain(|entry| open.contains(&entry.key));
        }
        if self.plan.wanted.mutant == Some(Mutant::NoLedger) && prefix.starts_with(LEDGER_KEY) {
            listed.0.clear();
        }
        listed
    }

    pub(crate) fn compare_and_swap(
        &mut self,
        task: TaskId,
        key: &str,
        expected: Option<Revision>,
        value: Option<bytes::Bytes>,
    ) -> Result<Revision, StoreError> {
        if key != TRUST_DOMAIN_KEY {
            if self.plan.wanted.mutant == Some(Mutant::NoLedger) && key.starts_with(LEDGER_KEY) {
                return Ok(self.store.put(key, value));
            }
            return self.store.compare_and_swap(key, expected, value);
        }
        // What was confirmed before this write was confirmed before it.
        self.refresh_all();
        let at = self.store.get(key).map(|entry| entry.revision);
        let value = self.bend(value);
        let written = match self.plan.wanted.mutant {
            Some(Mutant::NoCompareAndSwap) => Ok(self.store.put(key, value)),
            _ => self.store.compare_and_swap(key, expected, value),
        };
        match &written {
            Ok(revision) => {
                let by = match task {
                    TaskId::Controller(index) => {
                        self.wrote(index, at);
                        format!("controller {index}")
                    }
                    TaskId::Replica(index) => format!("replica {index}"),
                };
                self.state_written(&by, *revision);
            }
            Err(_) => self.counts.conflicts += 1,
        }
        written
    }

    pub(crate) fn answered(
        &mut self,
        task: TaskId,
        life: u32,
        reply: Reply,
        answer: &Arc<Mutex<Option<Reply>>>,
    ) {
        let (alive, _, frozen_until) = self.life_of(task);
        if alive != life {
            return;
        }
        if frozen_until > self.now {
            let answer = Arc::clone(answer);
            let reply = Box::new(reply);
            self.queue.push(frozen_until, Event::Answer { task, life, reply, answer });
            return;
        }
        *answer.lock().unwrap() = Some(reply);
        if let TaskId::Replica(index) = task {
            self.refresh(index);
        }
        self.go_on(task);
    }

    /// A query to every replica; their answers are gathered a moment later.
    fn ask(&mut self, task: TaskId, life: u32, nonce: u64, answer: Arc<Mutex<Option<Reply>>>) {
        self.counts.queries += 1;
        let cut = self.life_of(task).1;
        let replicas = 0..self.replicas.len();
        let mut ask = |r| if cut { Heard::Nothing } else { self.take_query(r, nonce) };
        let heard: Vec<_> = replicas.map(&mut ask).collect();
        // As `Network::ask_one`: three looks, and longer for one that does not answer at all.
        let wait = if heard.contains(&Heard::Nothing) { ASK_TIMEOUT } else { ASK_WAIT };
        self.queue.push(self.now + wait, Event::Asked { task, life, heard, answer });
    }

    pub(crate) fn gathered(
        &mut self,
        task: TaskId,
        life: u32,
        heard: &[Heard],
        answer: Arc<Mutex<Option<Reply>>>,
    ) {
        let replicas = 0..self.replicas.len();
        let replicas: Vec<_> = replicas.map(|r| self.report(r, heard[r])).collect();
        let reply = Box::new(Reply::Looked(replicas));
        self.queue.push(self.now, Event::Answer { task, life, reply, answer });
    }
}

const CALL_TRIP_MAX: Duration = Duration::from_millis(5);
const ASK_WAIT: Duration = Duration::from_millis(300);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
