//! The owner of a process's services.
//!
//! A service runs as long as its process: one that ends early, with or without an error, ends the
//! process with an error that names it, and a panic is an error like any other.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::drain::{Drain, terminated};

/// A service's name and how it ended.
type Ended = (&'static str, Result<(), String>);

/// The services of a process, each with its name.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<Ended>,
    names: Vec<(tokio::task::Id, &'static str)>,
}

/// Why a process ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A service ended without an error though nobody asked it to.
    #[error("the service {0:?} ended before the process was asked to stop")]
    Ended(&'static str),
    /// A service ended with an error.
    #[error("the service {0:?} failed: {1}")]
    Failed(&'static str, String),
    /// A service panicked.
    #[error("the service {0:?} panicked: {1}")]
    Panicked(&'static str, String),
    /// The handlers for SIGTERM and SIGINT could not be installed.
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
}

impl Tasks {
    /// No service yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a service.
    pub fn spawn<E: Display>(
        &mut self,
        name: &'static str,
        service: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let handle =
            self.set.spawn(async move { (name, service.await.map_err(|error| error.to_string())) });
        self.names.push((handle.id(), name));
    }

    /// Runs until SIGTERM or SIGINT, then drains: services are asked to finish and get until the
    /// deadline; a second signal ends the wait. What then still runs is dropped.
    ///
    /// # Errors
    /// A service that ended before the process was asked to stop, or failed or panicked at any time;
    /// of several the first, and a line for each that failed while the process stopped.
    pub async fn run(self, drain: &Drain, deadline: Duration) -> Result<(), TaskError> {
        self.run_until(async { terminated().await.map_err(TaskError::Signals) }, drain, deadline)
            .await
    }

    /// As [`Tasks::run`], with another reason to stop than a signal.
    ///
    /// # Errors
    /// As [`Tasks::run`].
    pub async fn run_until(
        mut self,
        stop: impl Future<Output = Result<(), TaskError>>,
        drain: &Drain,
        deadline: Duration,
    ) -> Result<(), TaskError> {
        tokio::select! {
            stopped = stop => stopped?,
            Some(ended) = self.set.join_next_with_id() => return Err(self.error_of(ended)),
        }
        drain.start();
        let mut first = None;
        let finished = async {
            drain.finished(deadline).await;
            while let Some(ended) = self.set.join_next_with_id().await {
                if matches!(ended, Ok((_, (_, Ok(()))))) {
                    continue;
                }
                let error = self.error_of(ended);
                tracing::error!("{error}, while the process stopped");
                first.get_or_insert(error);
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(deadline, finished) => {}
            _ = terminated() => tracing::warn!("asked to stop twice: ending at once"),
        }
        first.map_or(Ok(()), Err)
    }

    fn error_of(
        &self,
        ended: Result<(tokio::task::Id, Ended), tokio::task::JoinError>,
    ) -> TaskError {
        match ended {
            Ok((_, (name, Ok(())))) => TaskError::Ended(name),
            Ok((_, (name, Err(error)))) => TaskError::Failed(name, error),
            Err(panic) => {
                let name = self.names.iter().find(|(id, _)| *id == panic.id());
                TaskError::Panicked(name.map_or("unknown", |(_, name)| name), panic.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ended(tasks: Tasks) -> String {
        let never = std::future::pending::<Result<(), TaskError>>();
        match tasks.run_until(never, &Drain::new(), Duration::ZERO).await {
            Ok(()) => "stopped".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn a_service_that_ends_early_ends_the_process_by_name() {
        let mut tasks = Tasks::new();
        tasks.spawn("forever", std::future::pending::<Result<(), String>>());
        tasks.spawn("brief", async { Ok::<_, String>(()) });
        assert!(ended(tasks).await.contains("\"brief\" ended"));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_that_names_its_service() {
        let mut tasks = Tasks::new();
        tasks.spawn("shaky", async {
            assert_eq!(1, 2, "on purpose");
            Ok::<_, String>(())
        });
        assert!(ended(tasks).await.contains("\"shaky\" panicked"));
    }

    #[tokio::test]
    async fn a_service_that_fails_while_the_process_stops_is_an_error_that_names_it() {
        let (mut tasks, drain) = (Tasks::new(), Drain::new());
        for (name, outcome) in [("clean", Ok(())), ("first", Err("disk full"))] {
            let stop = drain.clone();
            tasks.spawn(name, async move {
                stop.wait().await;
                outcome
            });
        }
        let result = tasks.run_until(async { Ok(()) }, &drain, Duration::from_secs(10)).await;
        let error = result.unwrap_err().to_string();
        assert!(error.contains("\"first\" failed: disk full"), "{error}");
    }

    #[tokio::test]
    async fn services_are_asked_to_finish_and_waited_for() {
        let (mut tasks, drain) = (Tasks::new(), Drain::new());
        let (seen, done) = (drain.clone(), tokio::sync::oneshot::channel());
        tasks.spawn("polite", async move {
            seen.wait().await;
            done.0.send(()).map_err(|()| "nobody waits")
        });
        let result = tasks.run_until(async { Ok(()) }, &drain, Duration::from_secs(10)).await;
        assert!(result.is_ok());
        assert!(done.1.await.is_ok());
    }
}
