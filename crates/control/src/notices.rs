//! Events of what drivers find out by themselves.

use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::{Notice, Notices};
use dolmen_qmp::schema::{EventRow, Field, Shape, Ty};
use serde_json::json;

use crate::world::World;

/// Makes events of what drivers notice by themselves, until everything has ended.
pub(crate) async fn announce(world: Rc<World>, notices: Arc<Notices>) {
    loop {
        let ended = async {
            world.until(&world.ended).await;
            None
        };
        let noticed = async { Some(notices.next().await) };
        match futures_lite::future::or(noticed, ended).await {
            None => return,
            Some((node, notice @ Notice::BitmapsInvalid { .. })) => {
                if let Some(warning) = notice.warning(node.as_str()) {
                    world.log(&warning);
                }
                let Notice::BitmapsInvalid { bitmaps } = notice else { continue };
                world.event(
                    "BLOCK_BITMAPS_INVALIDATED",
                    json!({"node-name": node.as_str(), "bitmaps": bitmaps}),
                );
            }
            Some((node, Notice::Corrupted { message })) => world.event(
                "BLOCK_IMAGE_CORRUPTED",
                json!({"device": "", "node-name": node.as_str(), "msg": message, "fatal": true}),
            ),
            Some((node, Notice::WriteThreshold { threshold, exceeded })) => world.event(
                "BLOCK_WRITE_THRESHOLD",
                json!({"node-name": node.as_str(), "amount-exceeded": exceeded, "write-threshold": threshold}),
            ),
        }
    }
}

/// The events.
pub(crate) const EVENTS: &[EventRow] = &[
    EventRow {
        name: "BLOCK_BITMAPS_INVALIDATED",
        data: &Shape::of(&[
            Field::required("node-name", Ty::Str),
            Field::required("bitmaps", Ty::Array(&Ty::Str)),
        ]),
        help: "Dolmen's own. The first write to an image with persistent bitmaps: they are not kept up, so they are \
               not valid any more.",
    },
    EventRow {
        name: "BLOCK_IMAGE_CORRUPTED",
        data: &Shape::of(&[
            Field::required("device", Ty::Str),
            Field::optional("node-name", Ty::Str),
            Field::required("msg", Ty::Str),
            Field::optional("offset", Ty::Int),
            Field::optional("size", Ty::Int),
            Field::required("fatal", Ty::Bool),
        ]),
        help: "An image's metadata are damaged; it is marked corrupt and not written any more.",
    },
    EventRow {
        name: "BLOCK_WRITE_THRESHOLD",
        data: &Shape::of(&[
            Field::required("node-name", Ty::Str),
            Field::required("amount-exceeded", Ty::Int),
            Field::required("write-threshold", Ty::Int),
        ]),
        help: "A write has ended beyond the threshold of a node, which has none any more.",
    },
];
