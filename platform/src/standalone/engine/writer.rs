//! The writer: the only one who changes the store.
//!
//! It takes what waits as one group, makes it durable in one transaction and only then answers
//! anyone in it. A group that could not be written changes nothing: each of its requests is told
//! so, the disk is opened again before the next one, and until that succeeds it is tried every
//! second, so that a disk with room again needs nobody's help.

use std::sync::Arc;
use std::time::Duration;

use steadfast_api::Code;
use steadfast_process::Drain;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::disk::{Disk, DiskError};
use super::medium::Medium;
use super::state::{Write, revision_of};
use super::{Shared, WriterPanic};
use crate::store::{Event, Revision, StoreError};

/// Writes that belong together, and who waits for them.
pub(super) struct Request {
    pub(super) writes: Vec<Write>,
    pub(super) reply: oneshot::Sender<Reply>,
}

type Reply = Result<Vec<Revision>, StoreError>;

pub(super) struct Writer<M> {
    shared: Arc<Shared>,
    /// Away only while a thread works with it.
    disk: Option<Disk<M>>,
    requests: mpsc::Receiver<Request>,
}

impl<M: Medium> Writer<M> {
    pub(super) fn new(
        shared: Arc<Shared>,
        disk: Disk<M>,
        requests: mpsc::Receiver<Request>,
    ) -> Self {
        Self { shared, disk: Some(disk), requests }
    }

    /// Writes until the drain has begun and nothing waits any more.
    pub(super) async fn run(mut self, drain: Drain) -> Result<(), WriterPanic> {
        let mut draining = false;
        loop {
            let refusing = self.shared.refusing.borrow().is_some();
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.write_group(request).await?,
                    None => break,
                },
                () = drain.wait(), if !draining => {
                    // What waits is still taken, new requests are not.
                    draining = true;
                    self.requests.close();
                }
                () = tokio::time::sleep(REOPEN_EVERY), if refusing => self.reopen().await?,
            }
        }
        // Closing writes to the file too.
        self.on_disk(|disk| {
            drop(disk);
            (None, ())
        })
        .await
    }

    async fn write_group(&mut self, first: Request) -> Result<(), WriterPanic> {
        let mut group = vec![first];
        while group.len() < GROUP_MAX
            && let Ok(next) = self.requests.try_recv()
        {
            group.push(next);
        }
        let begun = Instant::now();
        let (mut staged, events, overflow) = {
            let state = self.shared.read();
            let staged = state.stage(group.iter().map(|request| request.writes.as_slice()));
            let events: Vec<Event> = staged.iter().flatten().flatten().cloned().collect();
            let overflow = state.overflow(&events);
            (staged, events, overflow)
        };
        if !events.is_empty() {
            match self.commit(events.clone(), overflow).await? {
                Ok(()) => self.shared.publish(events),
                Err(error) => {
                    self.refuse(&error);
                    // A conflict with what was not written in the end is none.
                    staged = self.refused(&group, &error);
                }
            }
        }
        let taken = begun.elapsed();
        for (request, staged) in group.into_iter().zip(staged) {
            let reply = staged.map(|events| events.iter().map(revision_of).collect::<Vec<_>>());
            self.shared.metrics.wrote(&reply, taken);
            // Whoever no longer waits does not learn it; the write stands all the same.
            let _ = request.reply.send(reply);
        }
        Ok(())
    }

    async fn commit(
        &mut self,
        events: Vec<Event>,
        overflow: usize,
    ) -> Result<Result<(), DiskError>, WriterPanic> {
        let shared = Arc::clone(&self.shared);
        let done = self
            .on_disk(move |mut disk| {
                let open = if disk.is_open() { Ok(()) } else { disk.reopen(&shared.read()) };
                let done = open.and_then(|()| disk.commit(&events, overflow));
                (Some(disk), done)
            })
            .await?;
        if done.is_ok() {
            self.accept();
        }
        Ok(done)
    }

    /// Tries whether the disk can be written again.
    async fn reopen(&mut self) -> Result<(), WriterPanic> {
        let shared = Arc::clone(&self.shared);
        let done = self
            .on_disk(move |mut disk| {
                let done = disk.reopen(&shared.read());
                (Some(disk), done)
            })
            .await?;
        match done {
            Ok(()) => self.accept(),
            Err(error) => self.refuse(&error),
        }
        Ok(())
    }

    /// Disk work on a thread that may block. The disk comes back, or was closed.
    async fn on_disk<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(Disk<M>) -> (Option<Disk<M>>, T) + Send + 'static,
    ) -> Result<T, WriterPanic> {
        let Some(disk) = self.disk.take() else {
            return Err(WriterPanic("the disk is closed".to_owned()));
        };
        let (disk, result) = tokio::task::spawn_blocking(move || work(disk))
            .await
            .map_err(|error| WriterPanic(error.to_string()))?;
        self.disk = disk;
        Ok(result)
    }

    fn refused(&self, group: &[Request], error: &DiskError) -> Vec<Result<Vec<Event>, StoreError>> {
        let state = self.shared.read();
        let why = || format!("{}: {error}", Code::STORE_WRITE_FAILED);
        let judge = |request: &Request| match state.stage([request.writes.as_slice()]).pop() {
            Some(Err(conflict)) => Err(conflict),
            _ => Err(StoreError::WriteFailed(why())),
        };
        group.iter().map(judge).collect()
    }

    fn refuse(&self, error: &DiskError) {
        let why = error.to_string();
        let news = self.shared.refusing.send_replace(Some(why.clone())).is_none();
        if news {
            tracing::error!(code = %Code::STORE_WRITE_FAILED, %why, "the store cannot write; it goes on answering reads and tries again by itself");
        }
    }

    fn accept(&self) {
        if self.shared.refusing.send_replace(None).is_some() {
            tracing::info!("the store writes again; nothing that was acknowledged was lost");
        }
    }
}

/// Requests that share a transaction at most.
const GROUP_MAX: usize = 128;

const REOPEN_EVERY: Duration = Duration::from_secs(1);
