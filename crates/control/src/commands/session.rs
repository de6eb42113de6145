//! The program itself: its version, its commands, its end.

use std::rc::Rc;

use dolmen_qmp::already_negotiated;
use dolmen_qmp::schema::{EMPTY, Field, NOTHING, SCHEMA_INFO, Shape, Ty, VERSION_INFO};
use dolmen_rt::LocalFuture;
use serde_json::json;

use crate::act::{Act, Proposal, Wait};
use crate::guard::Guard;
use crate::row::CommandRow;
use crate::world::{Answer, Done, World};

/// The negotiation is the business of the connection, which has done it before any command comes here.
struct Negotiate;

impl Act for Negotiate {
    fn wait(&self, _: &World) -> Wait {
        Wait::Nothing
    }

    fn propose<'a>(&'a mut self, _: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async { Err(already_negotiated()) })
    }

    fn perform(self: Box<Self>, _: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async { Err(already_negotiated()) })
    }
}

struct Quit;

impl Act for Quit {
    fn wait(&self, _: &World) -> Wait {
        Wait::Nothing
    }

    fn propose<'a>(&'a mut self, _: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async { Ok(()) })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            world.end();
            Ok(json!({}))
        })
    }
}

static ENABLE: Shape = Shape::of(&[Field::optional("enable", Ty::Array(&Ty::Enum(&["oob"])))]);
static NAME: Shape = Shape::of(&[Field::required("name", Ty::Str)]);

pub(crate) const ROWS: &[CommandRow] = &[
    CommandRow::verb(
        "qmp_capabilities",
        Ty::Object(&ENABLE),
        |_, _| Ok(Box::new(Negotiate)),
        "Finishes the negotiation; until then no other command is accepted.",
    ),
    CommandRow::query(
        "query-version",
        NOTHING,
        Ty::Object(&VERSION_INFO),
        |world, _| Ok(world.version.to_json()),
        "The version of QEMU whose behaviour to expect, and Dolmen's own version.",
    ),
    CommandRow::query(
        "query-commands",
        NOTHING,
        Ty::List(&NAME),
        |world, _| Ok(world.schema.command_names().map(|name| json!({ "name": name })).collect()),
        "The names of all commands.",
    ),
    CommandRow::query(
        "query-qmp-schema",
        NOTHING,
        Ty::List(&SCHEMA_INFO),
        |world, _| Ok(world.introspection.clone()),
        "Commands, events and types in detail.",
    ),
    CommandRow::verb(
        "quit",
        Ty::Object(&EMPTY),
        |_, _| Ok(Box::new(Quit)),
        "Drains, flushes, closes every image and ends the program.",
    )
    .ends_program(),
];
