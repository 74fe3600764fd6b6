//! Processes of ours: started with a log file, killed on drop and by the death of the test.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use crate::namespaces::child_of;
use crate::wait::until;

/// A running process and its log.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    command: Vec<String>,
    env: Vec<(String, String)>,
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// For messages and the log's name.
    pub name: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Its environment, beside PATH.
    pub env: Vec<(String, String)>,
    /// What puts it into the namespaces of a [`Namespaces`](crate::namespaces::Namespaces).
    pub entrance: Vec<String>,
    /// The network namespace it runs in.
    pub netns: Option<String>,
    /// The user it runs as, where not the test's own.
    pub uid: Option<u32>,
    /// What it reads as `/etc/hosts`.
    pub hosts: Option<PathBuf>,
}

impl Process {
    /// Starts it, with both outputs appended to `<log_dir>/<name>.log`.
    pub fn start(log_dir: &Path, spec: Spec) -> Self {
        let log = log_dir.join(format!("{}.log", spec.name));
        let command = spec.full_command();
        let child = spawn(&command, &spec.env, &log);
        Self { name: spec.name, child, log, command, env: spec.env }
    }

    /// Starts it again with the same command, after it was killed.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(&self.command, &self.env, &self.log);
    }

    /// Another one beside it, with the same command but for this argument, which was `from`.
    pub fn twin(&self, name: &str, from: &str, to: &str) -> Self {
        let other = |word: &String| if word == from { to.to_owned() } else { word.clone() };
        let command: Vec<_> = self.command.iter().map(other).collect();
        let log = self.log.with_file_name(format!("{name}.log"));
        let child = spawn(&command, &self.env, &log);
        Self { name: name.to_owned(), child, log, command, env: self.env.clone() }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        // What stands between reaps it, and ends as it did.
        let pid = self.pid();
        let between = pid != self.child.id();
        let killed = between && {
            let kill = Command::new("kill").args(["-KILL", &pid.to_string()]).output();
            kill.is_ok_and(|output| output.status.success())
        };
        // nsenter stops when what it has started is stopped, and would reap nobody.
        let _ = Command::new("kill").args(["-CONT", &self.child.id().to_string()]).output();
        // It may have ended by itself: these then fail, and it is gone.
        if !killed {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }

    /// SIGTERM.
    pub fn ask_to_stop(&self) {
        self.signal("-TERM");
    }

    /// SIGSTOP: it does nothing any more, and its connections stay open.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// SIGCONT: it goes on as if no time had passed.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status();
        assert!(sent.is_ok_and(|status| status.success()), "{} is gone", self.name);
    }

    /// Waits until it has ended by itself; its exit code.
    pub async fn ended(&mut self, deadline: Duration) -> Option<i32> {
        let name = self.name.clone();
        until(&format!("{name} ends"), deadline, || {
            let ended = self.child.try_wait();
            async move { ended.ok().flatten().ok_or_else(|| "still runs".to_owned()) }
        })
        .await
        .code()
    }

    /// Its process id. Where it has other process ids than we, what put it there stands between.
    pub fn pid(&self) -> u32 {
        // What is before its own first argument: how it gets to its place.
        let forked =
            self.command.iter().take(PLACE_WORDS).any(|word| word == "--pid" || word == "--fork");
        let child = if forked { child_of(self.child.id()) } else { None };
        child.unwrap_or(self.child.id())
    }

    /// Whether it still runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Everything it has printed so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for a line of the log that holds all of these texts.
    pub async fn logged(&self, texts: &[&str], deadline: Duration) -> String {
        until(&format!("{} logs {texts:?}", self.name), deadline, || {
            let log = self.log();
            let line = log.lines().find(|line| texts.iter().all(|text| line.contains(text)));
            let answer = line.map(str::to_owned).ok_or_else(|| format!("its log:\n{log}"));
            async move { answer }
        })
        .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let last: Vec<_> = log.lines().rev().take(LOG_LINES_SHOWN).collect();
            eprintln!("--- {}, the last lines:", self.name);
            let start = |line: &str| line.chars().take(LINE_CHARS_SHOWN).collect::<String>();
            last.iter().rev().for_each(|line| eprintln!("    {}", start(line)));
        }
        self.kill();
    }
}

impl Spec {
    /// A program of this workspace, by its name.
    pub fn ours(name: &str, binary: &str) -> Self {
        let command = vec![binary_path(binary).display().to_string()];
        Self { name: name.to_owned(), command, ..Self::default() }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: ToString>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.extend(args.into_iter().map(|arg| arg.to_string()));
        self
    }

    /// Adds a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// With what puts it into its namespace, gives it its user, and ends it with the test. Each of
    /// these replaces itself by the next, so the process id stays that of the program.
    fn full_command(&self) -> Vec<String> {
        let mut command = Vec::new();
        if !self.entrance.is_empty() {
            // Of the two, the outer may have to wait for the inner, which runs elsewhere.
            command.extend(["setpriv", "--pdeathsig", "KILL"].map(str::to_owned));
            command.extend(self.entrance.iter().cloned());
        }
        if let Some(netns) = &self.netns {
            command.extend(["nsenter".to_owned(), format!("--net=/run/netns/{netns}")]);
        }
        if let Some(hosts) = &self.hosts {
            let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
            command.extend(["unshare", "--mount", "sh", "-c", script].map(str::to_owned));
            command.push(hosts.display().to_string());
        }
        command.extend(["setpriv", "--pdeathsig", "KILL"].map(str::to_owned));
        if let Some(uid) = self.uid {
            command.extend([format!("--reuid={uid}"), "--clear-groups".to_owned()]);
        }
        command.extend(self.command.iter().cloned());
        command
    }
}

fn spawn(command: &[String], env: &[(String, String)], log: &Path) -> Child {
    let file = File::options().create(true).append(true).open(log).expect("the log opens");
    let mut program = Command::new(&command[0]);
    program
        .args(&command[1..])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(file.try_clone().expect("the log can be shared"))
        .stderr(file);
    let (started, child) = channel();
    let asked = spawner().send((program, started));
    asked.expect("the thread that starts processes goes on");
    let child = child.recv().expect("the thread that starts processes answers");
    child.unwrap_or_else(|error| panic!("{command:?} does not start: {error}"))
}

/// A thread that starts every process and never ends: `PR_SET_PDEATHSIG` fires when the *thread*
/// ends that started a process, and a test's thread may end before what other tests share.
fn spawner() -> &'static Sender<Order> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (orders, queue) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut program, started) in queue {
                // Whoever asked has panicked, if it does not wait.
                let _ = started.send(program.spawn());
            }
        });
        orders
    })
}

/// What to start, and who waits for it.
type Order = (Command, Sender<std::io::Result<Child>>);

/// A binary of this workspace: beside the test's own, where cargo puts both.
pub fn binary_path(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    // A test is in deps/, a binary of the rig one level up.
    let folder = test.parent().expect("it is in a folder");
    let folder = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
    let path = folder.expect("deps/ is in a folder").join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --workspace` with the same target directory and profile",
        path.display()
    );
    path
}

/// A port on loopback that nobody listens on. Below the range of ephemeral ports, so that no
/// outgoing connection takes it meanwhile.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % 180) as u16 * 100;
    for _ in 0..PORTS {
        let port = FIRST_PORT + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {FIRST_PORT} and {}", FIRST_PORT + PORTS)
}

/// [`free_port`] on 127.0.0.1.
pub fn free_addr() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

/// `setpriv --pdeathsig KILL nsenter` and six words of where to.
const PLACE_WORDS: usize = 10;
const FIRST_PORT: u16 = 12_000;
const PORTS: u16 = 20_000;
const LOG_LINES_SHOWN: usize = 25;
const LINE_CHARS_SHOWN: usize = 300;
