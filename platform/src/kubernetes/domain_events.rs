//! What has happened to the trust domain, as Events: for `kubectl describe` and `kubectl events`.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

use steadfast_api::KeyId;

use super::place::Kind;
use super::status::DomainStatus;
use super::store::{DOMAIN_NAME, failed};
use crate::store::StoreError;

/// Publishes them.
#[derive(Clone)]
pub struct DomainEvents {
    recorder: Recorder,
    domain: DomainStatus,
}

impl DomainEvents {
    /// As this controller, in this process.
    pub fn new(client: Client, controller: &str, instance: &str) -> Self {
        let (controller, instance) = (controller.to_owned(), Some(instance.to_owned()));
        let recorder = Recorder::new(client.clone(), Reporter { controller, instance });
        Self { recorder, domain: DomainStatus::new(client) }
    }

    /// Tells one: `reason` in one CamelCase word, `note` for people; a warning, if it needs somebody.
    ///
    /// # Errors
    /// The API server's. Events are for people: nothing waits for one.
    pub async fn publish(&self, warning: bool, reason: &str, note: &str) -> Result<(), StoreError> {
        let resource = Kind::DOMAIN.resource();
        let regarding = ObjectReference {
            api_version: Some(resource.api_version),
            kind: Some(resource.kind),
            name: Some(DOMAIN_NAME.to_owned()),
            uid: self.domain.uid().await?,
            ..ObjectReference::default()
        };
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.to_owned(),
            note: Some(note.chars().take(NOTE_CHARS_MAX).collect()),
            // Events of one reason and action count as one that was repeated.
            action: format!("{reason}-{}", &hex_of(note)[..8]),
            secondary: None,
        };
        self.recorder.publish(&event, &regarding).await.map_err(failed)
    }
}

fn hex_of(note: &str) -> String {
    KeyId::of_spki(note.as_bytes()).to_string()
}

/// The API server takes 1 KiB; a character may have four bytes.
const NOTE_CHARS_MAX: usize = 250;
